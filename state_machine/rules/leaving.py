"""What ends with a right: swarms are left at once, and a revocation tells every seeder.

Owned here: revocations, and a user's or a peer's departure from swarms. `groups.py`, `files.py` and
`swarms.py` decide when.
"""

from __future__ import annotations

from typing import Any

from state_machine import limits
from state_machine.model import Revocation, State, revocation_key, split_swarm_key
from state_machine.outcomes import Code, Refused

from .draft import Draft


def swarm_path(key: str, peer_id: str) -> str:
    group, name, _ = split_swarm_key(key)
    return f"/groups/{group}/files/{name}/swarm/{peer_id}"


def refuse_revocations(state: State, draft: Draft, count: int) -> Refused | None:
    """The refusal when `count` more revocations would be too many; None when they fit."""
    if len(state.revocations) + count <= limits.REVOCATIONS_MAX:
        return None
    return draft.refuse(
        Code.OVER_LIMIT,
        "too many rights were withdrawn lately; the cluster keeps each until old tokens have expired",
        hint="Try again in some minutes.",
    )


def revoke(
    state: State, draft: Draft, group: str, *, user: str = "", manifest_id: str = "", expires_ms: int
) -> None:
    key = revocation_key(user, manifest_id)
    before = state.revocations.get(group, key)
    if before is not None:
        expires_ms = max(expires_ms, before.expires_ms)
    state.revocations.put(group, key, Revocation(user, manifest_id, draft.revision, expires_ms))


def leave_swarm(state: State, draft: Draft, key: str, peer_id: str, reason: str) -> None:
    state.drop_holding(key, peer_id)
    if draft.watched:
        _, _, manifest_id = split_swarm_key(key)
        value: dict[str, Any] = {"peer_id": peer_id, "reason": reason, "manifest_id": manifest_id}
        draft.emit("swarm.left", swarm_path(key, peer_id), value)
    else:
        draft.touch()


def user_leaves_swarms(state: State, draft: Draft, group: str, user: str, reason: str) -> None:
    """All peers of the user leave all swarms of the group."""
    for peer_id in sorted(state.peers_of.get(user, ())):
        for key in state.swarms_in_group(peer_id, group):
            leave_swarm(state, draft, key, peer_id, reason)


def peer_leaves_swarms(state: State, draft: Draft, peer_id: str, reason: str) -> None:
    """The peer leaves all swarms of all groups, and lives no more until it announces again."""
    for key in sorted(state.swarms_of.get(peer_id, ())):
        leave_swarm(state, draft, key, peer_id, reason)
    if peer_id in state.leases:
        state.leases.drop(peer_id)
        draft.touch()
