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
| file.published / file.replaced | /groups/{g}/files/{n} | the file / the file plus "replaced_manifest_id" |
| file.removed | /groups/{g}/files/{n} | {"manifest_id","epoch","revoked_manifest_ids"} |
| swarm.changed | /groups/{g}/files/{n}/swarm/{peer_id} | {"peer_id","user","addresses","manifest_id","pieces","complete","quarantined"} |
| swarm.left | /groups/{g}/files/{n}/swarm/{peer_id} | {"peer_id","reason","manifest_id"} |
| peer.quarantined / peer.lifted | /groups/{g}/quarantine/{peer_id} | {"peer_id"} |
| user.registered | /users/{u} | {} |
| user.sessions_voided / session.revoked | /users/{u}/sessions | {"session_epoch"} / {"session_id"} |
| key.added / key.retired | /keys/{kid} | {"key_id","node_id","public_key"(base64url),"valid_until"} |

What is below something that goes is not named again: `group.deleted` ends all below the group, and
`file.removed` ends the swarms of all its versions. `revoked_manifest_ids` are those that the group shares
under no other name; a replaced version is not revoked, its swarm stays while it has peers. A revision
may have no events: then something changed that nobody watches (a renewed lease, a policy, a witness).

`epoch` in a removal is the revision of that removal: every token whose own epoch (the revision at which
its membership began) is lower is void. Revisions only rise, also over deleting and re-creating a group
of the same name, so no counter can be reused.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True, gc=False):
    type: str
    path: str
    value: Any


class Change(msgspec.Struct, frozen=True, gc=False):
    """All events of one revision."""

    revision: int
    events: tuple[Event, ...]
