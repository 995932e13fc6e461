"""Reading the state for the API, for tokens and leases, and for metrics. Pure; changes nothing.

Owned here: what each GET of `cluster/api/routes.py` needs, as small structs. Whether the caller may see
it is asked first, with `membership`; whether the state is recent enough is the read barrier's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from .commands import Announcement
from .model import File, Group, Holding, LogEntry, Member, Revocation, Role, SigningKey, State, swarm_key
from .outcomes import AnnounceValue
from .rules.swarms import plan_announcement


class Membership(msgspec.Struct, frozen=True):
    role: Role
    epoch: int  # the revision at which it began: stands in tokens
    since_ms: int


class GroupInfo(msgspec.Struct, frozen=True):
    name: str
    owner: str
    members: int
    role: Role | None  # the caller's
    requested: bool  # the caller has asked to join


class MemberInfo(msgspec.Struct, frozen=True):
    user: str
    role: Role
    since_ms: int
    epoch: int


class RequestInfo(msgspec.Struct, frozen=True):
    user: str
    requested_ms: int


class FileInfo(msgspec.Struct, frozen=True):
    group: str
    name: str
    kind: Literal["file", "folder"]
    size_bytes: int
    pieces: int
    piece_bytes: int
    algorithm: Literal["sha256", "blake3"]
    manifest_id: str
    seeders: int
    leechers: int
    shared_by: str
    shared_ms: int


class SwarmPeerInfo(msgspec.Struct, frozen=True):
    peer_id: str
    user: str
    addresses: tuple[str, ...]
    pieces: int
    complete: bool
    quarantined: bool


class PeerInfo(msgspec.Struct, frozen=True):
    peer_id: str
    user: str
    addresses: tuple[str, ...]
    counter: int | None  # of its lease; None when it does not live
    whole: bool  # it lives and has said everything


class RevocationInfo(msgspec.Struct, frozen=True):
    group: str
    user: str
    manifest_id: str
    epoch: int
    expires_ms: int


class SigningKeyInfo(msgspec.Struct, frozen=True):
    key_id: str
    node_id: str
    public_key: bytes
    valid_until_ms: int | None


# --- people -------------------------------------------------------------------------------------


def user_exists(state: State, user: str) -> bool:
    return user in state.users


def password_hash(state: State, user: str) -> str | None:
    row = state.users.get(user)
    return None if row is None else row.password_hash


def session_epoch(state: State, user: str) -> int | None:
    """What a new session of this user must carry; None when there is no such user."""
    row = state.users.get(user)
    return None if row is None else row.session_epoch


def session_valid(state: State, user: str, session_id: str, session_epoch: int) -> bool:
    """Neither the session nor all older sessions of the user were ended. Its expiry is the caller's."""
    row = state.users.get(user)
    return (
        row is not None
        and row.session_epoch == session_epoch
        and state.revoked_sessions.get(user, session_id) is None
    )


def registration(state: State) -> str:
    return state.registration


def invitation_expires_ms(state: State, invitation_hash: str) -> int | None:
    row = state.invitations.get(invitation_hash)
    return None if row is None else row.expires_ms


# --- groups -------------------------------------------------------------------------------------


def membership(state: State, group: str, user: str) -> Membership | None:
    """The same None for a stranger to the group and for a group that does not exist."""
    row = state.members.get(group, user)
    return None if row is None else Membership(row.role, row.epoch, row.since_ms)


def list_groups(state: State, caller: str) -> list[GroupInfo]:
    """All groups by name, as this user sees them."""
    return [
        _group_info(state, name, row, caller)
        for name, row in sorted(state.groups.items(), key=lambda item: item[0])
    ]


def show_group(state: State, group: str, caller: str) -> GroupInfo | None:
    row = state.groups.get(group)
    return None if row is None else _group_info(state, group, row, caller)


def _group_info(state: State, name: str, row: Group, caller: str) -> GroupInfo:
    members = state.members.rows(name)
    own = members.get(caller)
    requested = own is None and state.join_requests.get(name, caller) is not None
    return GroupInfo(name, row.owner, len(members), None if own is None else own.role, requested)


def list_members(state: State, group: str) -> list[MemberInfo]:
    """The owner, then the admins, then the members, each by standing."""

    def standing(item: tuple[str, Member]) -> tuple[int, int]:
        return ("owner", "admin", "member").index(item[1].role), item[1].role_epoch

    return [
        MemberInfo(user, row.role, row.since_ms, row.epoch)
        for user, row in sorted(state.members.rows(group).items(), key=standing)
    ]


def list_join_requests(state: State, group: str) -> list[RequestInfo]:
    """The longest waiting first."""
    rows = sorted(state.join_requests.rows(group).items(), key=lambda item: item[1].revision)
    return [RequestInfo(user, row.requested_ms) for user, row in rows]


def join_request(state: State, group: str, user: str) -> RequestInfo | None:
    row = state.join_requests.get(group, user)
    return None if row is None else RequestInfo(user, row.requested_ms)


def group_log(state: State, group: str) -> tuple[LogEntry, ...]:
    """The oldest first; at most `limits.GROUP_LOG_ENTRIES_MAX`."""
    log = state.group_logs.get(group)
    return () if log is None else log.entries


# --- files and swarms ---------------------------------------------------------------------------


def list_files(state: State, group: str) -> list[FileInfo]:
    """All files of the group by name."""
    rows = sorted(state.files.rows(group).items(), key=lambda item: item[0])
    return [_file_info(state, group, name, row) for name, row in rows]


def show_file(state: State, group: str, name: str) -> FileInfo | None:
    row = state.files.get(group, name)
    return None if row is None else _file_info(state, group, name, row)


def _file_info(state: State, group: str, name: str, row: File) -> FileInfo:
    count = state.count(swarm_key(group, name, row.manifest_id))
    return FileInfo(
        group,
        name,
        row.kind,
        row.size_bytes,
        row.pieces,
        row.piece_bytes,
        row.algorithm,
        row.manifest_id,
        count.seeders,
        count.leechers,
        row.shared_by,
        row.shared_ms,
    )


def has_version(state: State, group: str, name: str, manifest_id: str) -> bool:
    """The current version, or a replaced one that still has peers."""
    return state.version_pieces(group, name, manifest_id) is not None


def shares_manifest(state: State, group: str, manifest_id: str) -> bool:
    """Whether any version of any file in the group has this manifest."""
    return state.shares(group, manifest_id)


def swarm_peers(state: State, group: str, name: str, manifest_id: str = "") -> list[SwarmPeerInfo] | None:
    """The peers of one version ("": the current one) by id, without those that are hidden as
    unreachable; quarantined ones are marked. None when there is no such version."""
    if not manifest_id:
        file = state.files.get(group, name)
        if file is None:
            return None
        manifest_id = file.manifest_id
    elif state.version_pieces(group, name, manifest_id) is None:
        return None
    quarantined = state.quarantines.rows(group)
    return [
        _swarm_peer(state, peer_id, row, quarantined=peer_id in quarantined)
        for peer_id, row in sorted(
            state.holdings.rows(swarm_key(group, name, manifest_id)).items(), key=lambda item: item[0]
        )
        if not row.hidden
    ]


def _swarm_peer(state: State, peer_id: str, row: Holding, *, quarantined: bool) -> SwarmPeerInfo:
    peer = state.peers.get(peer_id)
    assert peer is not None, "who is in a swarm is bound to a user"
    return SwarmPeerInfo(peer_id, peer.user, peer.addresses, row.pieces, row.complete, quarantined)


def list_quarantine(state: State, group: str) -> list[SwarmPeerInfo]:
    """Quarantined peers of the group, by id; `pieces` and `complete` say nothing here."""
    infos = []
    for peer_id in sorted(state.quarantines.rows(group)):
        peer = state.peers.get(peer_id)
        user, addresses = ("", ()) if peer is None else (peer.user, peer.addresses)
        infos.append(SwarmPeerInfo(peer_id, user, addresses, 0, False, True))
    return infos


def is_quarantined(state: State, group: str, peer_id: str) -> bool:
    return state.quarantines.get(group, peer_id) is not None


# --- peers and leases ---------------------------------------------------------------------------


def peer(state: State, peer_id: str) -> PeerInfo | None:
    row = state.peers.get(peer_id)
    if row is None:
        return None
    counter = state.leases.get(peer_id)
    return PeerInfo(peer_id, row.user, row.addresses, counter, row.whole and counter is not None)


def all_peer_counters(state: State) -> Iterator[tuple[str, int]]:
    """Every living peer with its renewal counter. Use it up at once: the state must not change."""
    return state.leases.items()


def peer_counter_parts(state: State) -> Iterator[Iterable[tuple[str, int]]]:
    """The same in parts: the state may change between two of them, not while one is used."""
    return state.leases.parts()


def announcement_effect(state: State, announcement: Announcement) -> tuple[AnnounceValue, bool]:
    """What would be answered, and whether it would change anything: if not, it needs no log entry,
    only a renewal now and then."""
    value, plan = plan_announcement(state, announcement)
    return value, bool(plan)


# --- rights -------------------------------------------------------------------------------------


def signing_keys(state: State) -> list[SigningKeyInfo]:
    rows = sorted(state.signing_keys.items(), key=lambda item: item[0])
    return [_signing_key(key_id, row) for key_id, row in rows]


def signing_key(state: State, key_id: str) -> SigningKeyInfo | None:
    row = state.signing_keys.get(key_id)
    return None if row is None else _signing_key(key_id, row)


def _signing_key(key_id: str, row: SigningKey) -> SigningKeyInfo:
    return SigningKeyInfo(key_id, row.node_id, row.public_key, row.valid_until_ms)


def revocations(state: State, group: str) -> list[RevocationInfo]:
    """Of a group, which may exist no more."""

    def order(row: Revocation) -> tuple[int, str, str]:
        return row.epoch, row.user, row.manifest_id

    return [
        RevocationInfo(group, row.user, row.manifest_id, row.epoch, row.expires_ms)
        for row in sorted(state.revocations.rows(group).values(), key=order)
    ]


def token_valid(state: State, group: str, user: str, epoch: int, manifest_id: str = "") -> bool:
    """Whether the right behind a token still stands: the membership that began at `epoch` goes on, and
    the group still shares the manifest ("": not asked)."""
    row = state.members.get(group, user)
    return (
        row is not None
        and row.epoch == epoch
        and (not manifest_id or shares_manifest(state, group, manifest_id))
    )


# --- metrics ------------------------------------------------------------------------------------


def counts(state: State) -> dict[str, int]:
    """How many of what, for metrics. Each is a number that is kept, not counted."""
    return {
        "users": len(state.users),
        "groups": len(state.groups),
        "members": len(state.members),
        "join_requests": len(state.join_requests),
        "files": len(state.files),
        "old_versions": len(state.old_versions),
        "holdings": len(state.holdings),
        "peers": len(state.peers),
        "living_peers": len(state.leases),
        "quarantines": len(state.quarantines),
        "revocations": len(state.revocations),
        "revoked_sessions": len(state.revoked_sessions),
        "signing_keys": len(state.signing_keys),
        "invitations": len(state.invitations),
        "requests_kept": len(state.requests),
        "requests_kept_bytes": state.requests.kept_bytes,
    }
