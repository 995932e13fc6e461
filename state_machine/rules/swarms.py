"""Peers, their leases, what they hold, and what others say of them.

An announcement is first planned (`plan_announcement`, free of effect) and then carried out; a node that
wants to know whether an announcement is worth a log entry asks for the plan alone. A peer lives from an
announcement until its lease expires or it leaves. The renewal counter in its lease is the revision of
the latest sign of life that was logged, so no counter ever comes twice, not even after an expiry.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from state_machine import limits
from state_machine.commands import (
    Announcement,
    AnnouncePeers,
    ExpirePeers,
    LiftQuarantine,
    PutPeer,
    RenewPeers,
    ReportPeer,
)
from state_machine.model import Holding, Peer, Quarantine, State, Witnesses, split_swarm_key, swarm_key
from state_machine.names import is_peer_id, quoted
from state_machine.outcomes import AnnounceValue, Code, FactDropped, Refused

from .draft import Draft
from .groups import record
from .leaving import leave_swarm, peer_leaves_swarms, swarm_path
from .rights import require_admin, require_member

_NO_SWARMS: Final[dict[str, None]] = {}


def put_peer(state: State, command: PutPeer, draft: Draft) -> Any:
    peer_id, user = command.peer_id, command.user
    if not is_peer_id(peer_id):
        return draft.refuse(
            Code.INVALID, f"a peer's id has {limits.PEER_ID_CHARS} characters, a-z and 2-7", "peer_id"
        )
    if user not in state.users:
        return draft.refuse(Code.NOT_FOUND, f"there is no user {quoted(user)}", "user", "Register first.")
    known = state.peers.get(peer_id)
    if known is not None:
        if known.user == user:
            return None
        return draft.refuse(
            Code.CONFLICT,
            f"peer {peer_id} belongs to another user",
            "peer_id",
            "Use another home (--home) for another user: each home is a peer.",
        )
    others = state.peers_of.get(user, ())
    unused = None
    if len(others) >= limits.PEERS_PER_USER_MAX:
        silent = [(_bound(state, other), other) for other in others if other not in state.leases]
        if not silent:
            return draft.refuse(
                Code.OVER_LIMIT,
                f"{quoted(user)} runs {limits.PEERS_PER_USER_MAX} peers already",
                "peer_id",
                "Stop a peer first.",
            )
        unused = min(silent)[1]

    if unused is not None:
        state.drop_peer(unused)
    state.put_peer(peer_id, Peer(user, (), False, command.at_ms, draft.revision))
    draft.touch()
    return None


def _bound(state: State, peer_id: str) -> int:
    peer = state.peers.get(peer_id)
    assert peer is not None
    return peer.bound_revision


class Plan:
    """What one announcement would change. Falsy when nothing."""

    __slots__ = ("addresses", "leave", "leaves", "peer_id", "puts", "whole")

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.leave = False  # the peer leaves everything
        self.puts: dict[str, Holding] = {}
        self.leaves: list[str] = []
        self.addresses: tuple[str, ...] | None = None  # new ones
        self.whole: bool | None = None  # a new value, or a new life

    def __bool__(self) -> bool:
        return bool(
            self.leave or self.puts or self.leaves or self.addresses is not None or self.whole is not None
        )


def plan_announcement(state: State, announcement: Announcement) -> tuple[AnnounceValue, Plan]:
    """What is to be answered, and what would change. Reads only."""
    peer_id = announcement.peer_id
    plan = Plan(peer_id)
    peer = state.peers.get(peer_id)
    if peer is None or peer.user != announcement.user:
        return AnnounceValue(known=False, whole_wanted=True), plan
    lives = peer_id in state.leases
    if announcement.leaving:
        plan.leave = lives
        return AnnounceValue(known=True, whole_wanted=False), plan

    dropped: list[FactDropped] = []
    _plan_addresses(plan, peer, announcement, dropped)
    whole = announcement.whole or (peer.whole and lives)
    if not lives or whole != peer.whole:
        plan.whole = whole
    _plan_facts(state, plan, announcement, dropped)
    return AnnounceValue(True, not whole, tuple(dropped)), plan


def _plan_addresses(plan: Plan, peer: Peer, announcement: Announcement, dropped: list[FactDropped]) -> None:
    """No addresses mean those known so far: a fact may be announced without repeating them."""
    addresses = announcement.addresses
    if not addresses or addresses == peer.addresses:
        return
    if len(addresses) > limits.ADDRESSES_PER_PEER_MAX or any(
        not 0 < len(address) <= limits.ADDRESS_CHARS_MAX for address in addresses
    ):
        dropped.append(FactDropped("", "", "", "too many addresses, or one that is too long"))
    else:
        plan.addresses = addresses


def _plan_facts(state: State, plan: Plan, announcement: Announcement, dropped: list[FactDropped]) -> None:
    peer_id, user = announcement.peer_id, announcement.user
    held = state.swarms_of.get(peer_id, _NO_SWARMS).keys()
    said: dict[str, Holding | None] = {}
    joined = 0
    for number, fact in enumerate(announcement.facts):
        group, name, manifest_id = fact.group, fact.name, fact.manifest_id
        reason = ""
        pieces_all = None
        if number >= limits.FACTS_PER_ANNOUNCE_MAX:
            reason = "too many facts in one announcement"
        elif state.members.get(group, user) is None:
            reason = "not a member of the group"
        else:
            pieces_all = state.version_pieces(group, name, manifest_id)
            if pieces_all is None:
                reason = "the group shares no such version"
            elif not 0 <= fact.pieces <= pieces_all:
                reason = f"the version has {pieces_all} pieces"
        if reason or pieces_all is None:
            dropped.append(FactDropped(group, name, manifest_id, reason))
            continue
        key = swarm_key(group, name, manifest_id)
        if fact.gone:
            said[key] = None
            continue
        if key not in held and said.get(key) is None:
            if len(state.holdings.rows(key)) >= limits.SEEDERS_PER_SWARM_MAX:
                dropped.append(FactDropped(group, name, manifest_id, "the swarm is full"))
                continue
            if len(held) + joined >= limits.FACTS_PER_ANNOUNCE_MAX:
                dropped.append(FactDropped(group, name, manifest_id, "the peer is in too many swarms"))
                continue
            joined += 1
        said[key] = Holding(pieces_all if fact.complete else fact.pieces, fact.complete)

    for key, holding in said.items():
        if holding is None:
            if key in held:
                plan.leaves.append(key)
        elif key not in held or not _same(state.holdings.get(key, peer_id), holding):
            plan.puts[key] = holding
    if announcement.whole and len(held) > len(said.keys() & held):
        plan.leaves.extend(sorted(held - said.keys()))
    if announcement.whole or peer_id not in state.hidden_of:
        return
    for key in sorted(state.hidden_of[peer_id]):
        if key not in said:
            hidden = state.holdings.get(key, peer_id)
            assert hidden is not None
            plan.puts[key] = Holding(hidden.pieces, hidden.complete)


def _same(before: Holding | None, said: Holding) -> bool:
    return (
        before is not None
        and before.pieces == said.pieces
        and before.complete == said.complete
        and not before.hidden
    )


def _carry_out(state: State, draft: Draft, plan: Plan) -> None:
    peer_id = plan.peer_id
    if plan.leave:
        peer_leaves_swarms(state, draft, peer_id, "left")
        return
    peer = state.peers.get(peer_id)
    assert peer is not None
    if plan.addresses is not None or (plan.whole is not None and plan.whole != peer.whole):
        peer = replace(
            peer,
            addresses=peer.addresses if plan.addresses is None else plan.addresses,
            whole=peer.whole if plan.whole is None else plan.whole,
        )
        state.put_peer(peer_id, peer)
    draft.touch()
    state.leases.put(peer_id, draft.revision)
    for key in plan.leaves:
        leave_swarm(state, draft, key, peer_id, "withdrawn")
    for key, holding in plan.puts.items():
        state.put_holding(key, peer_id, holding)
        if draft.watched:
            _emit_swarm(state, draft, key, peer_id, peer, holding)
    if plan.addresses is not None and draft.watched:
        for key in sorted(state.swarms_of.get(peer_id, _NO_SWARMS).keys() - plan.puts.keys()):
            unchanged = state.holdings.get(key, peer_id)
            assert unchanged is not None
            _emit_swarm(state, draft, key, peer_id, peer, unchanged)


def _emit_swarm(state: State, draft: Draft, key: str, peer_id: str, peer: Peer, holding: Holding) -> None:
    group, _, manifest_id = split_swarm_key(key)
    value = {
        "peer_id": peer_id,
        "user": peer.user,
        "addresses": list(peer.addresses),
        "manifest_id": manifest_id,
        "pieces": holding.pieces,
        "complete": holding.complete,
        "quarantined": state.quarantines.get(group, peer_id) is not None,
    }
    draft.emit("swarm.changed", swarm_path(key, peer_id), value)


def announce_peers(state: State, command: AnnouncePeers, draft: Draft) -> Any:
    values = []
    for announcement in command.announcements:
        value, plan = plan_announcement(state, announcement)
        if plan:
            _carry_out(state, draft, plan)
        values.append(value)
    return tuple(values)


def renew_peers(state: State, command: RenewPeers, draft: Draft) -> Any:
    """Answers with those that live no more: they are to say everything anew."""
    unknown = []
    for peer_id in command.peer_ids:
        if state.leases.get(peer_id) is None:
            unknown.append(peer_id)
        else:
            state.leases.put(peer_id, draft.revision)
            draft.touch()
    return tuple(unknown)


def expire_peers(state: State, command: ExpirePeers, draft: Draft) -> Any:
    """Answers with those that expired; the others gave a sign of life meanwhile."""
    expired = []
    for peer_id, counter in command.peers:
        if state.leases.get(peer_id) == counter:
            peer_leaves_swarms(state, draft, peer_id, "silent")
            expired.append(peer_id)
    return tuple(expired)


def report_peer(state: State, command: ReportPeer, draft: Draft) -> Any:
    group, name, manifest_id = command.group, command.name, command.manifest_id
    actor = require_member(state, draft, group, command.actor)
    if isinstance(actor, Refused):
        return actor
    key = swarm_key(group, name, manifest_id)
    holding = state.holdings.get(key, command.peer_id)
    peer = state.peers.get(command.peer_id)
    if holding is None or peer is None or state.version_pieces(group, name, manifest_id) is None:
        return draft.refuse(
            Code.NOT_FOUND, f"the peer is not in the swarm of {quoted(name)} in {quoted(group)}", "peer_id"
        )
    if peer.user != command.actor:  # what one says of oneself proves nothing
        if command.fault == "bad_piece":
            _witness_bad_piece(state, command, draft)
        else:
            _witness_unreachable(state, command, draft, key, holding)
    return {
        "quarantined": state.quarantines.get(group, command.peer_id) is not None,
        "hidden": (state.holdings.get(key, command.peer_id) or holding).hidden,
    }


def _witness_bad_piece(state: State, command: ReportPeer, draft: Draft) -> None:
    group, peer_id = command.group, command.peer_id
    if state.quarantines.get(group, peer_id) is not None:
        return
    known = state.witnesses.get(group, peer_id)
    # Who left or was removed witnesses no more: a liar's word goes with the liar.
    users = tuple(
        user for user in (known.users if known else ()) if state.members.get(group, user) is not None
    )
    if command.actor not in users:
        users = (*users, command.actor)
    elif known is not None and users == known.users:
        return
    if len(users) < limits.QUARANTINE_WITNESSES:
        state.witnesses.put(group, peer_id, Witnesses(users))
        draft.touch()
        return
    if known is not None:
        state.witnesses.drop(group, peer_id)
    state.put_quarantine(group, peer_id, Quarantine(command.at_ms, draft.revision))
    draft.emit("peer.quarantined", f"/groups/{group}/quarantine/{peer_id}", {"peer_id": peer_id})
    record(state, draft, group, command.at_ms, "", "quarantine", peer_id)


def _witness_unreachable(state: State, command: ReportPeer, draft: Draft, key: str, holding: Holding) -> None:
    if holding.hidden or command.actor in holding.witnesses:
        return
    users = tuple(user for user in holding.witnesses if state.members.get(command.group, user) is not None)
    users = (*users, command.actor)
    hidden = len(users) >= limits.UNREACHABLE_WITNESSES
    changed = replace(holding, hidden=hidden, witnesses=() if hidden else users)
    state.put_holding(key, command.peer_id, changed)
    draft.touch()
    if hidden:
        value = {"peer_id": command.peer_id, "reason": "unreachable", "manifest_id": command.manifest_id}
        draft.emit("swarm.left", swarm_path(key, command.peer_id), value)


def lift_quarantine(state: State, command: LiftQuarantine, draft: Draft) -> Any:
    group, peer_id = command.group, command.peer_id
    actor = require_admin(state, draft, group, command.actor, "lift a quarantine")
    if isinstance(actor, Refused):
        return actor
    if state.quarantines.get(group, peer_id) is None:
        return draft.refuse(
            Code.NOT_FOUND, f"the peer is not in quarantine in group {quoted(group)}", "peer_id"
        )
    state.drop_quarantine(group, peer_id)
    draft.emit("peer.lifted", f"/groups/{group}/quarantine/{peer_id}", {"peer_id": peer_id})
    record(state, draft, group, command.at_ms, command.actor, "lift quarantine", peer_id)
    return None
