"""Small worlds for tests: few names, so that random commands meet each other; and reading a machine."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from hypothesis import strategies as st

from state_machine import codec, queries
from state_machine import commands as c
from state_machine.machine import StateMachine
from state_machine.model import TABLES, State
from state_machine.outcomes import Outcome
from state_machine.snapshot import FrozenMachine

USERS = ["ann", "bob", "cia", "dan", "eve", "fay", "gus"]
GROUPS = ["g", "h"]
NAMES = ["x", "y", "z"]
MANIFESTS = [str(n) * 64 for n in range(4)]
PEERS = [letter * 52 for letter in "abcdefg"]
SESSIONS = ["s1", "s2"]
HASHES = [str(n) * 64 for n in range(8, 10)]
KEYS = ["k1", "k2"]
PIECES = {manifest: n + 1 for n, manifest in enumerate(MANIFESTS)}


def request_id(minted_ms: int, number: int = 0) -> str:
    text = f"{minted_ms:012x}7{number >> 62 & 0xFFF:03x}8{number & 0xFFFFFFFFFFFFFFF:015x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def request_hash(body: str) -> bytes:
    return hashlib.sha256(body.encode()).digest()


def run(machine: StateMachine, command: c.AnyCommand, **request: Any) -> Outcome:
    return machine.apply([codec.encode(command, **request)])[0]


def load(pieces: list[bytes], into: StateMachine | None = None) -> StateMachine:
    machine = into or StateMachine()
    loader = machine.loader()
    for piece in pieces:
        loader.feed(piece)
        while loader.work():
            pass
    loader.finish()
    return machine


def copy_of(machine: StateMachine) -> StateMachine:
    return load(list(machine.freeze().slices()))


def digest_of(frozen: FrozenMachine) -> bytes:
    return load(list(frozen.slices())).digest()


def derived(state: State) -> dict[str, Any]:
    """What is kept beside the tables, as plain values."""
    return {
        "owned": state.owned_counts,
        "peers_of": {key: sorted(row) for key, row in state.peers_of.items()},
        "swarms_of": {key: sorted(row) for key, row in state.swarms_of.items()},
        "hidden_of": {key: sorted(row) for key, row in state.hidden_of.items()},
        "counts": {key: msgspec.structs.astuple(row) for key, row in state.counts.items()},
        "manifest_uses": state.manifest_uses,
        "sizes": {name: len(getattr(state, name)) for name in TABLES},
        "requests": (len(state.requests), state.requests.kept_bytes),
    }


def view(machine: StateMachine) -> dict[str, Any]:
    """Everything that can be seen, through the queries, in the form of `NaiveModel.view`."""
    state = machine.state
    groups = queries.list_groups(state, "nobody")
    return {
        "revision": machine.revision,
        "policy": queries.registration(state),
        "users": {
            user: (
                queries.password_hash(state, user),
                queries.session_epoch(state, user),
                [
                    s
                    for s in SESSIONS
                    if queries.session_valid(state, user, s, queries.session_epoch(state, user) or 0)
                ],
            )
            for user in USERS
            if queries.user_exists(state, user)
        },
        "invitations": {
            h: expires for h in HASHES if (expires := queries.invitation_expires_ms(state, h)) is not None
        },
        "groups": {group.name: _view_group(state, group) for group in groups},
        "peers": {
            p: (row.user, row.addresses, row.counter, row.whole)
            for p in PEERS
            if (row := queries.peer(state, p)) is not None
        },
        "revocations": sorted(
            (r.group, r.user, r.manifest_id, r.epoch, r.expires_ms)
            for g in GROUPS
            for r in queries.revocations(state, g)
        ),
        "keys": {
            row.key_id: (row.node_id, row.public_key, row.valid_until_ms)
            for row in queries.signing_keys(state)
        },
    }


def _view_group(state: State, group: queries.GroupInfo) -> dict[str, Any]:
    name = group.name
    members = queries.list_members(state, name)
    assert group.members == len(members)
    for row in members:
        own = queries.membership(state, name, row.user)
        assert own == queries.Membership(row.role, row.epoch, row.since_ms)
    assert members[0].user == group.owner, "the owner is listed first"
    return {
        "owner": [group.owner],
        "members": {m.user: (m.role, m.since_ms, m.epoch) for m in members},
        "requests": [(r.user, r.requested_ms) for r in queries.list_join_requests(state, name)],
        "log": [msgspec.structs.astuple(entry) for entry in queries.group_log(state, name)],
        "quarantine": [p.peer_id for p in queries.list_quarantine(state, name)],
        "files": {file.name: _view_file(state, file) for file in queries.list_files(state, name)},
    }


def _view_file(state: State, file: queries.FileInfo) -> dict[str, Any]:
    swarms = {}
    for manifest in MANIFESTS:
        peers = queries.swarm_peers(state, file.group, file.name, manifest)
        assert (peers is None) != queries.has_version(state, file.group, file.name, manifest)
        if peers is not None:
            swarms[manifest] = [(p.peer_id, p.pieces, p.complete, p.quarantined) for p in peers]
            assert all(p.user == queries.peer(state, p.peer_id).user for p in peers)
    assert queries.show_file(state, file.group, file.name) == file
    return {
        "file": (
            file.kind, file.size_bytes, file.pieces, file.manifest_id, file.shared_by, file.shared_ms
        ),
        "seeders": file.seeders,
        "leechers": file.leechers,
        "swarms": swarms,
    }  # fmt: skip


# --- random commands ----------------------------------------------------------------------------

_users = st.sampled_from(USERS)
_groups = st.sampled_from(["g", "g", "g", "h"])
_names = st.sampled_from(NAMES)
_manifests = st.sampled_from(MANIFESTS)
_peers = st.sampled_from(PEERS)
_times = st.integers(0, 100)
_counters = st.integers(0, 40)

_facts = st.builds(
    lambda group, name, manifest, pieces, complete, gone: c.Fact(
        group, name, manifest, pieces, complete, gone
    ),
    _groups,
    _names,
    _manifests,
    st.integers(-1, 5),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
)


@st.composite
def _announcements(draw: st.DrawFn) -> c.Announcement:
    number = draw(st.integers(0, len(PEERS) - 1))
    # Mostly the peer that `HISTORY` binds to that user.
    user = USERS[number] if number < len(USERS) and draw(st.integers(0, 9)) else draw(_users)
    return c.Announcement(
        PEERS[number],
        user,
        draw(st.sampled_from([(), ("a:1",), ("a:1", "b:2")])),
        tuple(draw(st.lists(_facts, max_size=4))),
        draw(st.booleans()),
        draw(st.integers(0, 9)) == 0,
    )


def _publish(group: str, name: str, manifest: str, replace: bool, user: str, at: int) -> c.PublishFile:
    return c.PublishFile(
        group, name, "file", 16384 * PIECES[manifest], PIECES[manifest], 16384, "sha256", manifest,
        replace, user, at, at + 10,
    )  # fmt: skip


_faults = st.sampled_from(["bad_piece", "unreachable", "stalled"])

COMMANDS: st.SearchStrategy[c.AnyCommand] = st.one_of(
    st.builds(
        c.RegisterUser, st.sampled_from([*USERS, "a/b"]), st.just("h"), _times, st.sampled_from(["", *HASHES])
    ),
    st.builds(c.ChangePassword, _users, st.sampled_from(["h1", "h2"]), _times),
    st.builds(c.RevokeSession, _users, st.sampled_from(SESSIONS), _times),
    st.builds(c.SetPolicy, st.sampled_from(["open", "invitation"])),
    st.builds(c.CreateInvitation, st.sampled_from(HASHES), _times),
    st.builds(c.CreateGroup, _groups, _users, _times),
    st.builds(c.DeleteGroup, _groups, _users, _times, _times),
    st.builds(c.RequestJoin, _groups, _users, _times),
    st.builds(c.WithdrawRequest, _groups, _users, _times),
    st.builds(c.AcceptRequest, _groups, _users, _users, _times),
    st.builds(c.RejectRequest, _groups, _users, _users, _times),
    st.builds(c.LeaveGroup, _groups, _users, _times, _times),
    st.builds(c.KickMember, _groups, _users, _users, _times, _times),
    st.builds(c.PromoteMember, _groups, _users, _users, _times),
    st.builds(c.DemoteMember, _groups, _users, _users, _times),
    st.builds(c.TransferGroup, _groups, _users, _users, _times),
    st.builds(_publish, _groups, _names, _manifests, st.booleans(), _users, _times),
    st.builds(_publish, _groups, _names, _manifests, st.booleans(), _users, _times),
    st.builds(c.RemoveFile, _groups, _names, _users, _times, _times),
    st.builds(c.PutPeer, _peers, _users, _times),
    st.builds(lambda a, at: c.AnnouncePeers(tuple(a), at), st.lists(_announcements(), max_size=3), _times),
    st.builds(lambda a, at: c.AnnouncePeers((a,), at), _announcements(), _times),
    st.builds(lambda p: c.RenewPeers(tuple(p)), st.lists(_peers, max_size=4)),
    st.builds(lambda p: c.ExpirePeers(tuple(p)), st.lists(st.tuples(_peers, _counters), max_size=6)),
    st.builds(c.ReportPeer, _groups, _names, _manifests, _peers, _faults, _users, _times),
    st.builds(c.LiftQuarantine, _groups, _peers, _users, _times),
    st.builds(
        c.PutSigningKey, st.sampled_from(KEYS), st.sampled_from(["n1", "n2"]), st.just(b"k" * 32), _times
    ),
    st.builds(c.RetireSigningKey, st.sampled_from(KEYS), _times),
    st.builds(c.Prune, st.integers(0, 30)),
)

# A group with members, files and seeders: random commands then have something to change.
HISTORY: list[c.AnyCommand] = [
    *(c.RegisterUser(user, "h", 1) for user in USERS[:5]),
    *(c.PutPeer(peer, user, 1) for peer, user in zip(PEERS, USERS[:5], strict=False)),
    c.CreateGroup("g", "ann", 2),
    *(c.RequestJoin("g", user, 3) for user in USERS[1:3]),
    *(c.AcceptRequest("g", user, "ann", 4) for user in USERS[1:3]),
    *(c.RequestJoin("g", user, 3) for user in USERS[3:5]),
    *(c.AcceptRequest("g", user, "ann", 4) for user in USERS[3:5]),
    c.PromoteMember("g", "cia", "ann", 5),
    _publish("g", "x", MANIFESTS[0], False, "bob", 6),
    _publish("g", "y", MANIFESTS[1], False, "ann", 6),
    c.AnnouncePeers(
        tuple(
            c.Announcement(PEERS[n], USERS[n], ("a:1",), (c.Fact("g", "x", MANIFESTS[0], 1, True),), True)
            for n in range(2)
        ),
        7,
    ),
]
