"""A limit on everything, and a test for each limit: at it, yes; past it, a refusal that names the field."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from state_worlds import request_hash, request_id, run

from state_machine import codec, limits, queries
from state_machine import commands as c
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied, Code, Refused

M = "0" * 64


@pytest.fixture
def machine() -> StateMachine:
    machine = StateMachine()
    ok(machine, c.RegisterUser("ann", "h", 1), c.CreateGroup("g", "ann", 1))
    return machine


def ok(machine: StateMachine, *commands: c.AnyCommand) -> None:
    for command in commands:
        outcome = run(machine, command)
        assert isinstance(outcome, Applied), outcome


def over(machine: StateMachine, command: c.AnyCommand, field: str = "") -> None:
    before = machine.digest()
    outcome = run(machine, command)
    assert isinstance(outcome, Refused), outcome
    assert (outcome.code, outcome.field) == (Code.OVER_LIMIT, field)
    assert len(outcome.message) < 400
    assert machine.digest() == before


def publish(name: str = "f", manifest: str = M, **more: Any) -> c.PublishFile:
    size, pieces = more.pop("size_bytes", 1), more.pop("pieces", 1)
    return c.PublishFile(
        "g", name, "file", size, pieces, more.pop("piece_bytes", 16384), "sha256", manifest,
        more.pop("replace", False), more.pop("user", "ann"), 1, 99,
    )  # fmt: skip


def join(machine: StateMachine, *users: str) -> None:
    for user in users:
        ok(machine, c.RegisterUser(user, "h", 1), c.RequestJoin("g", user, 1))
        ok(machine, c.AcceptRequest("g", user, "ann", 1))


def announce(machine: StateMachine, peer_id: str, user: str, *facts: c.Fact, **more: Any) -> Any:
    addresses = more.pop("addresses", ("a:1",))
    outcome = run(machine, c.AnnouncePeers((c.Announcement(peer_id, user, addresses, facts, **more),), 1))
    assert isinstance(outcome, Applied)
    return outcome.value[0]


def test_names(machine: StateMachine) -> None:
    ok(machine, c.RegisterUser("é" * limits.USER_NAME_CHARS_MAX, "h", 1))
    over(machine, c.RegisterUser("u" * (limits.USER_NAME_CHARS_MAX + 1), "h", 1), "user")
    ok(machine, c.CreateGroup("w" * limits.GROUP_NAME_CHARS_MAX, "ann", 1))
    over(machine, c.CreateGroup("w" * (limits.GROUP_NAME_CHARS_MAX + 1), "ann", 1), "name")
    over(machine, c.CreateGroup("w" * 500_000, "ann", 1), "name")
    ok(machine, publish("é" * 127 + "x"))
    over(machine, publish("é" * 128), "name")
    assert limits.FILE_NAME_BYTES_MAX == 255


def test_password_hash(machine: StateMachine) -> None:
    ok(machine, c.ChangePassword("ann", "h" * limits.PASSWORD_HASH_CHARS_MAX, 1))
    over(machine, c.ChangePassword("ann", "h" * (limits.PASSWORD_HASH_CHARS_MAX + 1), 1), "password")
    over(machine, c.RegisterUser("bob", "h" * (limits.PASSWORD_HASH_CHARS_MAX + 1), 1), "password")


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("size_bytes", limits.FILE_SIZE_BYTES_MAX),
        ("pieces", limits.PIECES_PER_FILE_MAX),
        ("piece_bytes", limits.PIECE_BYTES_MAX),
    ],
)
def test_numbers_of_a_file(machine: StateMachine, field: str, most: int) -> None:
    roomy = {"pieces": limits.PIECES_PER_FILE_MAX, "piece_bytes": limits.PIECE_BYTES_MAX}
    over(machine, publish(**(roomy | {field: most + 1})), field)
    ok(machine, publish(**(roomy | {field: most})))


def test_users(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "USERS_MAX", 2)
    ok(machine, c.RegisterUser("bob", "h", 1))
    over(machine, c.RegisterUser("cia", "h", 1), "user")


def test_groups(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUPS_MAX", 2)
    ok(machine, c.CreateGroup("h", "ann", 1))
    over(machine, c.CreateGroup("i", "ann", 1), "name")


def test_groups_of_one_owner(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUPS_PER_USER_MAX", 2)
    ok(machine, c.CreateGroup("h", "ann", 1))
    over(machine, c.CreateGroup("i", "ann", 1), "group")
    join(machine, "bob")
    ok(machine, c.TransferGroup("g", "bob", "ann", 1), c.CreateGroup("i", "ann", 1))
    over(machine, c.TransferGroup("g", "ann", "bob", 1), "group")


def test_members(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MEMBERS_PER_GROUP_MAX", 2)
    join(machine, "bob")
    ok(machine, c.RegisterUser("cia", "h", 1), c.RequestJoin("g", "cia", 1))
    over(machine, c.AcceptRequest("g", "cia", "ann", 1), "user")


def test_join_requests(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOIN_REQUESTS_PER_GROUP_MAX", 1)
    for user in ("bob", "cia"):
        ok(machine, c.RegisterUser(user, "h", 1))
    ok(machine, c.RequestJoin("g", "bob", 1), c.RequestJoin("g", "bob", 1))
    over(machine, c.RequestJoin("g", "cia", 1), "group")


def test_files(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILES_PER_GROUP_MAX", 1)
    ok(machine, publish("f"))
    over(machine, publish("f2"), "name")
    ok(machine, publish("f", "1" * 64, replace=True))


def test_peers_of_a_user(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEERS_PER_USER_MAX", 2)
    a, b, z = "a" * 52, "b" * 52, "z" * 52
    ok(machine, c.PutPeer(a, "ann", 1), c.PutPeer(b, "ann", 1))
    announce(machine, a, "ann")
    announce(machine, b, "ann")
    over(machine, c.PutPeer(z, "ann", 1), "peer_id")
    announce(machine, b, "ann", leaving=True)
    ok(machine, c.PutPeer(z, "ann", 1))  # in the place of one that lives no more
    assert queries.peer(machine.state, b) is None
    assert queries.peer(machine.state, a) is not None


def test_addresses(machine: StateMachine) -> None:
    peer = "a" * 52
    ok(machine, c.PutPeer(peer, "ann", 1))
    most = tuple(f"{n}:" + "x" * (limits.ADDRESS_CHARS_MAX - 2) for n in range(limits.ADDRESSES_PER_PEER_MAX))
    assert announce(machine, peer, "ann", addresses=most).dropped == ()
    for bad in ((*most, "y:1"), ("y" * (limits.ADDRESS_CHARS_MAX + 1),), ("",)):
        [dropped] = announce(machine, peer, "ann", addresses=bad).dropped
        assert "address" in dropped.reason
        assert queries.peer(machine.state, peer).addresses == most  # type: ignore[union-attr]


def test_seeders_of_a_swarm(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEEDERS_PER_SWARM_MAX", 1)
    ok(machine, publish(), c.PutPeer("a" * 52, "ann", 1), c.PutPeer("b" * 52, "ann", 1))
    fact = c.Fact("g", "f", M, 1, True)
    assert announce(machine, "a" * 52, "ann", fact).dropped == ()
    assert announce(machine, "b" * 52, "ann", fact).dropped[0].reason == "the swarm is full"
    assert announce(machine, "a" * 52, "ann", c.Fact("g", "f", M, 0, False)).dropped == ()


def test_facts_of_an_announcement_and_of_a_peer(
    machine: StateMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FACTS_PER_ANNOUNCE_MAX", 2)
    facts = []
    for n in range(3):
        ok(machine, publish(f"f{n}", f"{n:064x}"))
        facts.append(c.Fact("g", f"f{n}", f"{n:064x}", 1, True))
    ok(machine, c.PutPeer("a" * 52, "ann", 1))
    [dropped] = announce(machine, "a" * 52, "ann", *facts).dropped
    assert (dropped.name, dropped.reason) == ("f2", "too many facts in one announcement")
    [dropped] = announce(machine, "a" * 52, "ann", facts[2]).dropped
    assert dropped.reason == "the peer is in too many swarms"


def test_versions_of_a_file(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "VERSIONS_PER_FILE_MAX", 2)
    ok(machine, c.PutPeer("a" * 52, "ann", 1))
    for n in range(5):
        manifest = f"{n:064x}"
        ok(machine, publish("f", manifest, replace=True))
        assert announce(machine, "a" * 52, "ann", c.Fact("g", "f", manifest, 1, True)).dropped == ()
    alive = [n for n in range(5) if queries.has_version(machine.state, "g", "f", f"{n:064x}")]
    assert alive == [2, 3, 4], "the current one and the two latest before it"


def test_the_log_of_a_group(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUP_LOG_ENTRIES_MAX", 3)
    join(machine, "bob", "cia", "dan", "eve")
    assert [entry.subject for entry in queries.group_log(machine.state, "g")] == ["cia", "dan", "eve"]


def test_revocations(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    join(machine, "bob", "cia")
    ok(machine, publish())
    monkeypatch.setattr(limits, "REVOCATIONS_MAX", 1)
    over(machine, c.RemoveFile("g", "f", "ann", 1, 9))
    ok(machine, c.KickMember("g", "bob", "ann", 1, 9))
    for command in (
        c.KickMember("g", "cia", "ann", 1, 9),
        c.LeaveGroup("g", "cia", 1, 9),
        c.DeleteGroup("g", "ann", 1, 9),
    ):
        over(machine, command)
    ok(machine, c.Prune(10), c.KickMember("g", "cia", "ann", 1, 9))


def test_revoked_sessions(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REVOKED_SESSIONS_MAX", 1)
    ok(machine, c.RevokeSession("ann", "s1", 9), c.RevokeSession("ann", "s1", 9))
    over(machine, c.RevokeSession("ann", "s2", 9))
    ok(machine, c.ChangePassword("ann", "h2", 1), c.RevokeSession("ann", "s2", 9))
    assert run(machine, c.RevokeSession("ann", "s" * 200, 9)).code == Code.INVALID  # type: ignore[union-attr]


def test_signing_keys(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIGNING_KEYS_MAX", 1)
    ok(machine, c.PutSigningKey("k1", "n", b"k" * 32, 1))
    over(machine, c.PutSigningKey("k2", "n", b"k" * 32, 1))


def test_invitations(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INVITATIONS_MAX", 1)
    ok(machine, c.CreateInvitation("1" * 64, 9))
    over(machine, c.CreateInvitation("2" * 64, 9))


def test_bytes_of_a_command(machine: StateMachine) -> None:
    data = codec.encode(c.CreateGroup("w" * limits.COMMAND_BYTES_MAX, "ann", 1))
    [outcome] = machine.apply([data])
    assert isinstance(outcome, Refused)
    assert outcome.code == Code.OVER_LIMIT


def test_forms_of_identifiers(machine: StateMachine) -> None:
    assert len("a" * 52) == limits.PEER_ID_CHARS
    assert len(M) == limits.MANIFEST_ID_CHARS
    assert len(request_id(1)) == limits.REQUEST_ID_CHARS
    for bad in ("a" * 51, "a" * 53, "A" * 52, "1" * 52, ""):
        outcome = run(machine, c.PutPeer(bad, "ann", 1))
        assert isinstance(outcome, Refused)
        assert (outcome.code, outcome.field) == (Code.INVALID, "peer_id")
    for bad in ("0" * 63, "0" * 65, "G" * 64, "A" * 64, ""):
        outcome = run(machine, publish(manifest=bad))
        assert isinstance(outcome, Refused)
        assert (outcome.code, outcome.field) == (Code.INVALID, "manifest_id")
    outcome = run(machine, publish(size_bytes=16385))
    assert isinstance(outcome, Refused)
    assert (outcome.code, outcome.field) == (Code.INVALID, "pieces")
    outcome = run(machine, publish(piece_bytes=limits.PIECE_BYTES_MIN - 1))
    assert isinstance(outcome, Refused)
    assert (outcome.code, outcome.field) == (Code.INVALID, "piece_bytes")


def test_kept_requests_follow_the_limits(machine: StateMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_KEPT_MAX", 10)
    for n in range(1, 30):
        run(
            machine,
            c.SetPolicy("open"),
            caller="ann",
            request_id=request_id(n),
            request_hash=request_hash("x"),
        )
    assert len(machine.state.requests) == 10
    assert limits.REQUESTS_KEPT_BYTES_MAX  # see test_state_requests.py
    assert limits.REQUEST_ID_AHEAD_MS_MAX


BAD_NAMES: list[tuple[str, str]] = [
    ("", "is empty"),
    (".", "cannot be"),
    ("..", "cannot be"),
    ("a/b", "'/'"),
    ("/abs", "'/'"),
    ("../x", "'/'"),
    ("a\x00b", "control"),
    ("a\nb", "control"),
    ("a\x7fb", "control"),
    ("a\x9fb", "control"),
    ("a\u202eb", "invisible"),
    ("a\u200bb", "invisible"),
    (" a", "white space"),
    ("a ", "white space"),
    ("e\u0301", "normal form C"),
]
NAMED: dict[str, tuple[str, Callable[[str], c.AnyCommand]]] = {
    "user name": ("user", lambda name: c.RegisterUser(name, "h", 1)),
    "group name": ("name", lambda name: c.CreateGroup(name, "ann", 1)),
    "file name": ("name", publish),
}


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize(("name", "why"), BAD_NAMES)
def test_bad_names_are_refused_by_name(machine: StateMachine, what: str, name: str, why: str) -> None:
    field, command = NAMED[what]
    outcome = run(machine, command(name))
    assert isinstance(outcome, Refused)
    assert (outcome.code, outcome.field) == (Code.INVALID, field)
    assert what in outcome.message
    assert why in outcome.message
    assert outcome.message.isprintable()


@pytest.mark.parametrize("what", NAMED)
@pytest.mark.parametrize(
    "name", ["a", "é", "日本語", "Ω.tar.gz", "имя файла", "a\\b", "...", "👩‍👩‍👧", "CON"]
)
def test_names_in_any_script(machine: StateMachine, what: str, name: str) -> None:
    ok(machine, NAMED[what][1](name))


def test_every_limit_is_used_by_a_test() -> None:
    """Also a reminder for whoever adds one."""
    root = Path(__file__).parents[2]
    names = {
        node.target.id
        for node in ast.parse((root / "state_machine/limits.py").read_text()).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_state_*.py"))
    elsewhere = {"COMMANDS_PER_ENTRY_MAX", "ENTRY_BYTES_MAX"}  # of Raft's entries: cluster/raft
    assert {name for name in names - elsewhere if name not in tested} == set()
