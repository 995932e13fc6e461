"""What changed: the events of one revision, in order. They feed the watch; they are not state.

Paths are resource paths without `/v1`. `value` is the resource as the API shows it (plain types), or
None when it is gone. Who may see an event follows from its path (`cluster/watch.py`):
`/groups/{g}` itself is seen by all users (groups are listed publicly); below it by members only,
`join-requests` by admins and the user concerned; `/users/{u}` and below by that user; `/keys` by all
signed-in users; `/swarms/...` by members of the group.

| type | path | value |
|---|---|---|
| group.created / group.deleted | /groups/{g} | {"owner","group_id"} / {"group_id","epoch"} |
| member.added / member.changed / member.removed | /groups/{g}/members/{u} | {"user","role","since","epoch"} / {"user","epoch"} |
| request.added / request.removed | /groups/{g}/join-requests/{u} | {"user","requested_at"} / {"reason"} |
| file.published / file.replaced / file.removed | /groups/{g}/files/{n} | the file / the file plus "revoked_manifest_id" / {"manifest_id","epoch"} |
| swarm.changed / swarm.left | /groups/{g}/files/{n}/swarm/{peer_id} | {"peer_id","user","addresses","manifest_id","pieces","complete"} / {"peer_id","reason"} |
| peer.quarantined / peer.lifted | /groups/{g}/quarantine/{peer_id} | {"peer_id"} |
| user.registered | /users/{u} | {} |
| user.sessions_voided / session.revoked | /users/{u}/sessions | {"session_epoch"} / {"session_id"} |
| key.added / key.retired | /keys/{kid} | {"key_id","node_id","public_key"(base64url),"valid_until"} |

`epoch` in a removal is the revision of that removal: every token whose own epoch (the revision at which
its membership began) is lower is void. Revisions only rise, also over deleting and re-creating a group
of the same name, so no counter can be reused.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True):
    type: str
    path: str
    value: Any


class Change(msgspec.Struct, frozen=True):
    """All events of one revision."""

    revision: int
    events: tuple[Event, ...]
