"""The replicated state: its rows, its tables, and what is derived from them.

Owned here: the rows that snapshots hold, and keeping the derived counts and indices in step with them;
so every change goes through a method of `State`. Left to others: whether a change may happen (`rules/`),
reading for the API (`queries.py`), encoding (`snapshot.py`).

Rows are immutable and free of cycles (`gc=False`): a million of them cost the garbage collector nothing.
Derived sets have no order that could be relied on; whoever walks one, sorts it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from .requests import Requests
from .tables import Nest, Table

Role = Literal["owner", "admin", "member"]
# Sets, as dicts to None: the garbage collector leaves dicts of strings alone, but not sets of them.
Index = dict[str, dict[str, None]]


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all rows. New fields are appended with a default."""


class User(Row, frozen=True, gc=False):
    password_hash: str
    session_epoch: int
    registered_ms: int


class Invitation(Row, frozen=True, gc=False):
    expires_ms: int


class Group(Row, frozen=True, gc=False):
    owner: str
    created_ms: int
    group_id: int  # the revision of its creation: tells it from an earlier group of the same name


class Member(Row, frozen=True, gc=False):
    role: Role
    since_ms: int
    epoch: int  # the revision at which the membership began
    role_epoch: int  # the revision at which the role began


class JoinRequest(Row, frozen=True, gc=False):
    requested_ms: int
    revision: int


class LogEntry(Row, frozen=True, gc=False):
    revision: int
    at_ms: int
    actor: str  # "" for the cluster itself
    action: str
    subject: str


class GroupLog(Row, frozen=True, gc=False):
    entries: tuple[LogEntry, ...]


class File(Row, frozen=True, gc=False):
    kind: Literal["file", "folder"]
    size_bytes: int
    pieces: int
    piece_bytes: int
    algorithm: Literal["sha256", "blake3"]
    manifest_id: str
    shared_by: str
    shared_ms: int
    revision: int


class OldVersion(Row, frozen=True, gc=False):
    """A replaced version of a file; it stays as long as its swarm has peers, so that downloads end."""

    pieces: int
    revision: int  # of its replacement


class Holding(Row, frozen=True, gc=False):
    """What a peer holds of a version. `hidden`: reported unreachable, until the peer's next announce."""

    pieces: int
    complete: bool
    hidden: bool = False
    witnesses: tuple[str, ...] = ()  # members who could not get pieces from it


class Peer(Row, frozen=True, gc=False):
    user: str
    addresses: tuple[str, ...]
    whole: bool  # has said everything since it came alive
    bound_ms: int
    bound_revision: int


class Quarantine(Row, frozen=True, gc=False):
    at_ms: int
    revision: int


class Witnesses(Row, frozen=True, gc=False):
    """Members who received a wrong piece from a peer, each once."""

    users: tuple[str, ...]


class Revocation(Row, frozen=True, gc=False):
    user: str  # "": of a file's version, or of all
    manifest_id: str
    epoch: int  # tokens of a lower epoch are void
    expires_ms: int


class RevokedSession(Row, frozen=True, gc=False):
    expires_ms: int


class SigningKey(Row, frozen=True, gc=False):
    node_id: str
    public_key: bytes
    added_ms: int
    valid_until_ms: int | None = None  # None: not retired


class SwarmCount(msgspec.Struct, gc=False):
    """Peers of one swarm that others may ask: neither hidden nor quarantined."""

    seeders: int = 0
    leechers: int = 0


NO_COUNT: Final = SwarmCount()


def file_key(group: str, name: str) -> str:
    """Names hold no '/', so the key is unique."""
    return f"{group}/{name}"


def swarm_key(group: str, name: str, manifest_id: str) -> str:
    return f"{group}/{name}/{manifest_id}"


def split_swarm_key(key: str) -> tuple[str, str, str]:
    group, name, manifest_id = key.split("/")
    return group, name, manifest_id


class State:
    """One moment of the whole. Reading the tables is free to all; changing goes through the methods."""

    def __init__(self) -> None:
        self.revision = 0
        self.registration: Literal["open", "invitation"] = "open"

        self.users: Table[User] = Table()
        self.invitations: Table[Invitation] = Table(16)
        self.revoked_sessions: Nest[RevokedSession] = Nest()  # user, session id
        self.groups: Table[Group] = Table()
        self.members: Nest[Member] = Nest()  # group, user
        self.join_requests: Nest[JoinRequest] = Nest()  # group, user
        self.group_logs: Table[GroupLog] = Table()
        self.files: Nest[File] = Nest()  # group, name
        self.old_versions: Nest[OldVersion] = Nest()  # file key, manifest id
        self.holdings: Nest[Holding] = Nest()  # swarm key, peer id
        self.peers: Table[Peer] = Table()
        self.leases: Table[int] = Table()  # living peer: its renewal counter, a revision
        self.quarantines: Nest[Quarantine] = Nest()  # group, peer id
        self.witnesses: Nest[Witnesses] = Nest()  # group, peer id
        self.revocations: Nest[Revocation] = Nest()  # group, see `revocation_key`
        self.signing_keys: Table[SigningKey] = Table(16)
        self.requests = Requests()

        # Derived: rebuilt when a snapshot is loaded, by the same methods that keep them.
        self.owned_counts: dict[str, int] = {}  # user: groups owned
        self.peers_of: Index = {}  # user: peer ids
        self.swarms_of: Index = {}  # peer id: swarm keys
        self.hidden_of: Index = {}  # peer id: swarm keys where it is hidden
        self.counts: dict[str, SwarmCount] = {}  # swarm key
        self.manifest_uses: dict[str, dict[str, int]] = {}  # group: manifest id: versions that have it

    # --- groups ---------------------------------------------------------------------------------

    def put_group(self, name: str, group: Group) -> None:
        before = self.groups.get(name)
        if before is not None:
            _lower(self.owned_counts, before.owner)
        _raise(self.owned_counts, group.owner)
        self.groups.put(name, group)

    def drop_group(self, name: str) -> None:
        """The group and all that is below it, but its revocations."""
        _lower(self.owned_counts, self.groups.drop(name).owner)
        for file_name in list(self.files.rows(name)):
            self.drop_file(name, file_name)
        self.members.drop_all(name)
        self.join_requests.drop_all(name)
        self.quarantines.drop_all(name)
        self.witnesses.drop_all(name)
        if name in self.group_logs:
            self.group_logs.drop(name)

    # --- files ----------------------------------------------------------------------------------

    def put_file(self, group: str, name: str, file: File) -> None:
        """Put the current version. A version it replaces must have been moved or dropped before."""
        before = self.files.get(group, name)
        if before is not None:
            self._lower_use(group, before.manifest_id)
        _raise(self.manifest_uses.setdefault(group, {}), file.manifest_id)
        self.files.put(group, name, file)

    def put_old_version(self, group: str, name: str, manifest_id: str, version: OldVersion) -> None:
        assert self.old_versions.get(file_key(group, name), manifest_id) is None
        _raise(self.manifest_uses.setdefault(group, {}), manifest_id)
        self.old_versions.put(file_key(group, name), manifest_id, version)

    def drop_old_version(self, group: str, name: str, manifest_id: str) -> None:
        """The version; its swarm must be empty or be dropped with `drop_swarm`."""
        self.old_versions.drop(file_key(group, name), manifest_id)
        self._lower_use(group, manifest_id)

    def drop_file(self, group: str, name: str) -> list[str]:
        """The file, its old versions, and all their swarms. Returns the manifest ids, sorted."""
        old = sorted(self.old_versions.rows(file_key(group, name)))
        for manifest_id in old:
            self.drop_swarm(swarm_key(group, name, manifest_id))
            self.drop_old_version(group, name, manifest_id)
        manifest_id = self.files.drop(group, name).manifest_id
        self._lower_use(group, manifest_id)
        self.drop_swarm(swarm_key(group, name, manifest_id))
        return sorted([*old, manifest_id])

    def version_pieces(self, group: str, name: str, manifest_id: str) -> int | None:
        """How many pieces this version of the file has; None when there is no such version."""
        file = self.files.get(group, name)
        if file is None:
            return None
        if file.manifest_id == manifest_id:
            return file.pieces
        old = self.old_versions.get(file_key(group, name), manifest_id)
        return None if old is None else old.pieces

    def shares(self, group: str, manifest_id: str) -> bool:
        """Whether any version of any file in the group has this manifest."""
        return manifest_id in self.manifest_uses.get(group, ())

    def _lower_use(self, group: str, manifest_id: str) -> None:
        uses = self.manifest_uses[group]
        _lower(uses, manifest_id)
        if not uses:
            del self.manifest_uses[group]

    # --- swarms ---------------------------------------------------------------------------------

    def put_holding(self, key: str, peer_id: str, holding: Holding) -> None:
        before = self.holdings.get(key, peer_id)
        if (
            before is not None
            and before.complete == holding.complete
            and not (before.hidden or holding.hidden)
        ):
            self.holdings.put(key, peer_id, holding)  # more pieces, which is nearly all that is ever said
            return
        counted = self.quarantines.get(key[: key.index("/")], peer_id) is None
        if before is None:
            self.swarms_of.setdefault(peer_id, {})[key] = None
        else:
            if before.hidden:
                _discard(self.hidden_of, peer_id, key)
            elif counted:
                self._count(key, before, -1)
        if holding.hidden:
            self.hidden_of.setdefault(peer_id, {})[key] = None
        elif counted:
            self._count(key, holding, 1)
        self.holdings.put(key, peer_id, holding)

    def drop_holding(self, key: str, peer_id: str) -> None:
        """Take the peer out of the swarm; an old version that nobody holds any more goes too."""
        holding = self.holdings.drop(key, peer_id)
        _discard(self.swarms_of, peer_id, key)
        group, name, manifest_id = split_swarm_key(key)
        if holding.hidden:
            _discard(self.hidden_of, peer_id, key)
        elif self.quarantines.get(group, peer_id) is None:
            self._count(key, holding, -1)
        if not self.holdings.rows(key) and self.old_versions.get(file_key(group, name), manifest_id):
            self.drop_old_version(group, name, manifest_id)

    def drop_swarm(self, key: str) -> None:
        for peer_id, holding in self.holdings.rows(key).items():
            _discard(self.swarms_of, peer_id, key)
            if holding.hidden:
                _discard(self.hidden_of, peer_id, key)
        self.holdings.drop_all(key)
        self.counts.pop(key, None)

    def put_quarantine(self, group: str, peer_id: str, quarantine: Quarantine) -> None:
        assert self.quarantines.get(group, peer_id) is None
        for key in self.swarms_in_group(peer_id, group):
            holding = self.holdings.get(key, peer_id)
            assert holding is not None
            if not holding.hidden:
                self._count(key, holding, -1)
        self.quarantines.put(group, peer_id, quarantine)

    def drop_quarantine(self, group: str, peer_id: str) -> None:
        self.quarantines.drop(group, peer_id)
        for key in self.swarms_in_group(peer_id, group):
            holding = self.holdings.get(key, peer_id)
            assert holding is not None
            if not holding.hidden:
                self._count(key, holding, 1)

    def swarms_in_group(self, peer_id: str, group: str) -> list[str]:
        """The swarm keys of one peer in one group, sorted."""
        prefix = group + "/"
        return sorted(key for key in self.swarms_of.get(peer_id, ()) if key.startswith(prefix))

    def count(self, key: str) -> SwarmCount:
        return self.counts.get(key, NO_COUNT)

    def _count(self, key: str, holding: Holding, by: int) -> None:
        count = self.counts.get(key)
        if count is None:
            count = self.counts[key] = SwarmCount()
        if holding.complete:
            count.seeders += by
        else:
            count.leechers += by
        assert count.seeders >= 0 <= count.leechers, "a swarm cannot count fewer peers than none"
        if count.seeders == 0 == count.leechers:
            del self.counts[key]

    # --- peers ----------------------------------------------------------------------------------

    def put_peer(self, peer_id: str, peer: Peer) -> None:
        before = self.peers.get(peer_id)
        if before is None:
            self.peers_of.setdefault(peer.user, {})[peer_id] = None
        else:
            assert before.user == peer.user, "a peer never changes hands"
        self.peers.put(peer_id, peer)

    def drop_peer(self, peer_id: str) -> None:
        """Forget a binding; the peer must be in no swarm and hold no lease."""
        assert peer_id not in self.swarms_of and peer_id not in self.leases
        _discard(self.peers_of, self.peers.drop(peer_id).user, peer_id)


# Name: row type. The order is that of loading: quarantines count before the holdings they hide.
TABLES: Final[dict[str, type[object]]] = {
    "users": User,
    "invitations": Invitation,
    "revoked_sessions": RevokedSession,
    "groups": Group,
    "members": Member,
    "join_requests": JoinRequest,
    "group_logs": GroupLog,
    "files": File,
    "old_versions": OldVersion,
    "quarantines": Quarantine,
    "witnesses": Witnesses,
    "peers": Peer,
    "leases": int,
    "holdings": Holding,
    "revocations": Revocation,
    "signing_keys": SigningKey,
}


def revocation_key(user: str, manifest_id: str) -> str:
    """One revocation for each user, each manifest, and ("" and "") for all of a group."""
    return f"{user}/{manifest_id}"


def _raise(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _lower(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


def _discard(index: Index, key: str, member: str) -> None:
    members = index[key]
    del members[member]
    if not members:
        del index[key]
