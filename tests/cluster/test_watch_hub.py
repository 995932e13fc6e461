"""The watch without HTTP: a real state machine, sinks that remember, and a naive model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.tokens import SessionClaims
from cluster.settings import ServiceSettings
from cluster.watch import HEARTBEAT_SLOTS, HistoryGoneError, Hub, Watcher, normal_prefix
from state_machine import codec
from state_machine import commands as c
from state_machine.events import Change, Event
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied

SETTINGS = ServiceSettings(cluster_id="t", data_dir=Path("unused"))
USERS = ("anna", "ben", "carl")


@dataclass
class Remembering:
    """A sink. `stuck` ones never take anything off."""

    stuck: bool = False
    parts: list[bytes] = field(default_factory=list)
    ended: bool = False
    left: bool = False
    writes: int = 0

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.parts.append(data)
        self.writes += 1

    def queued_bytes(self) -> int:
        return sum(map(len, self.parts)) if self.stuck else 0

    def gone(self) -> bool:
        return self.left

    def end(self) -> None:
        self.ended = True

    def events(self) -> list[tuple[int, str, str]]:
        """(revision, type, path) of everything that was said."""
        return [
            (message["revision"], event["type"], event["path"])
            for message in self.messages()
            for event in message["events"]
        ]

    def messages(self) -> list[dict[str, Any]]:
        found = []
        for part in b"".join(self.parts).split(b"\n\n"):
            lines = part.split(b"\n")
            if lines[0].startswith(b"id: ") and len(lines) == 2:
                message = orjson.loads(lines[1].removeprefix(b"data: "))
                assert message["revision"] == int(lines[0][4:])
                found.append(message)
        return found

    @property
    def last_words(self) -> dict[str, Any]:
        part = self.parts[-1]
        assert part.startswith(b"event: end\ndata: ")
        return orjson.loads(part.removeprefix(b"event: end\ndata: "))


class World:
    def __init__(self, **changes: Any) -> None:
        self.machine = StateMachine()
        self.changes: list[Change] = []
        self.hub = Hub(self.machine, msgspec.structs.replace(SETTINGS, **changes))
        self.machine.follow(self._changed, self.hub.restored)
        for user in USERS:
            self.do(c.RegisterUser(user, "hash", 0))

    def _changed(self, change: Change) -> None:
        self.changes.append(change)
        self.hub.publish(change)

    def do(self, command: c.AnyCommand) -> bool:
        return isinstance(self.machine.apply([codec.encode(command)])[0], Applied)

    def watch(
        self, user: str, *prefixes: str, since: int | None = None, sink: Remembering | None = None
    ) -> tuple[Watcher, Remembering]:
        sink = sink or Remembering()
        claims = SessionClaims(
            user=user, session_id=f"s-{user}", epoch=1, issued_at_ms=0, expires_at_ms=1 << 50
        )
        normal = tuple(normal_prefix(prefix) or "" for prefix in prefixes or ("/",))
        return self.hub.add(claims, normal, sink, since), sink

    def group(self, group: str, owner: str, *members: str) -> None:
        self.do(c.CreateGroup(group, owner, 0))
        for member in members:
            self.do(c.RequestJoin(group, member, 0))
            self.do(c.AcceptRequest(group, member, owner, 0))

    def publish(self, group: str, name: str, actor: str) -> None:
        assert self.do(
            c.PublishFile(
                group, name, "file", 1, 1, 16384, "sha256", name.encode().hex().zfill(64), True, actor, 0, 0
            )
        )


def test_strangers_see_that_a_group_is_and_nothing_in_it() -> None:
    world = World()
    sinks = {user: world.watch(user)[1] for user in USERS}
    world.group("boats", "anna", "ben")
    world.publish("boats", "hull", "anna")
    seen = {user: [(type_, path) for _, type_, path in sink.events()] for user, sink in sinks.items()}
    assert seen["carl"] == [("group.created", "/groups/boats")]
    assert seen["anna"] == [
        ("group.created", "/groups/boats"),
        ("member.added", "/groups/boats/members/anna"),
        ("request.added", "/groups/boats/join-requests/ben"),
        ("request.removed", "/groups/boats/join-requests/ben"),
        ("member.added", "/groups/boats/members/ben"),
        ("file.published", "/groups/boats/files/hull"),
    ]
    assert seen["ben"] == [
        ("group.created", "/groups/boats"),
        ("request.added", "/groups/boats/join-requests/ben"),
        ("request.removed", "/groups/boats/join-requests/ben"),
        ("member.added", "/groups/boats/members/ben"),
        ("file.published", "/groups/boats/files/hull"),
    ]


@pytest.mark.parametrize("prefix", ["/", "/groups", "/groups/boats", "/groups/boats/"])
def test_who_is_removed_sees_the_removal_and_nothing_after(prefix: str) -> None:
    world = World()
    world.group("boats", "anna", "ben")
    _, sink = world.watch("ben", prefix)
    world.publish("boats", "before", "anna")
    world.do(c.KickMember("boats", "ben", "anna", 0, 0))
    world.publish("boats", "after", "anna")
    assert [path for _, _, path in sink.events()] == [
        "/groups/boats/files/before",
        "/groups/boats/members/ben",
    ]
    _, resumed = world.watch("ben", prefix, since=3)
    assert {path for _, _, path in resumed.events()} <= {
        "/groups/boats",
        "/groups/boats/members/ben",
        "/groups/boats/join-requests/ben",
    }, "what was seen as a member is not told again to one who is none"


def test_prefixes_are_whole_segments_and_messages_hold_a_revision() -> None:
    world = World()
    world.group("boats", "anna")
    world.group("boatsmen", "anna")
    _, narrow = world.watch("anna", "/groups/boats/files")
    _, twice = world.watch("anna", "/groups/boats", "/groups/boats/files", "/groups/boats/files/hull")
    world.publish("boatsmen", "oar", "anna")
    world.publish("boats", "hull", "anna")
    assert [path for _, _, path in narrow.events()] == ["/groups/boats/files/hull"]
    assert twice.events() == narrow.events(), "asked for twice is told once"
    assert len(twice.messages()) == 1


def test_all_events_of_a_revision_travel_together() -> None:
    world = World()
    _, sink = world.watch("anna")
    world.do(c.CreateGroup("boats", "anna", 0))
    assert [len(message["events"]) for message in sink.messages()] == [2]


def test_a_slow_reader_is_cut_off_and_told() -> None:
    world = World(watch_queue_bytes_max=2_000)
    world.group("boats", "anna")
    watcher, slow = world.watch("anna", sink=Remembering(stuck=True))
    _, quick = world.watch("anna")
    for number in range(20):
        world.publish("boats", f"file{number}", "anna")
    assert slow.ended
    assert len(b"".join(slow.parts)) < 3_000, "the queue is bounded"
    assert slow.last_words["reason"] == "slow"
    assert slow.last_words["revision"] == slow.messages()[-1]["revision"] == watcher.revision
    assert "again" in slow.last_words["hint"]
    assert len(quick.events()) == 20, "nobody else is concerned"
    _, resumed = world.watch("anna", since=watcher.revision)
    assert slow.events() + resumed.events() == quick.events()


def test_history_is_bounded_and_what_is_older_is_gone() -> None:
    world = World(watch_kept_changes_max=5)
    world.group("boats", "anna")
    for number in range(10):
        world.publish("boats", f"file{number}", "anna")
    floor = world.hub.floor
    assert floor == world.machine.revision - 5
    _, sink = world.watch("anna", since=floor)
    assert [path for _, _, path in sink.events()] == [f"/groups/boats/files/file{n}" for n in range(5, 10)]
    with pytest.raises(HistoryGoneError):
        world.watch("anna", since=floor - 1)


def test_too_much_of_the_past_is_not_told_at_once() -> None:
    world = World(watch_queue_bytes_max=1_000)
    world.group("boats", "anna")
    begun = world.machine.revision
    for number in range(30):
        world.publish("boats", f"file{number}", "anna")
    with pytest.raises(HistoryGoneError):
        world.watch("anna", since=begun)
    watcher, sink = world.watch("anna", since=begun + 15, sink=Remembering(stuck=True))
    assert 1_000 < len(b"".join(sink.parts)) < watcher.queue_bytes_max
    world.publish("boats", "next", "anna")
    assert not sink.ended, "who began with much may have that much waiting"


def test_history_is_bounded_in_bytes() -> None:
    world = World(watch_kept_bytes_max=10_000)
    world.group("boats", "anna")
    for number in range(100):
        world.publish("boats", f"file{number}", "anna")
    _, sink = world.watch("anna", since=world.hub.floor)
    assert 1 <= len(sink.events()) < 20


def test_a_snapshot_ends_streams_and_history() -> None:
    world = World()
    _, sink = world.watch("anna")
    other = StateMachine()
    for user in (*USERS, "dora"):
        other.apply([codec.encode(c.RegisterUser(user, "hash", 0))])
    loader = world.machine.loader()
    for data in other.freeze().slices():
        loader.feed(data)
        while loader.work():
            pass
    loader.finish()
    assert sink.ended
    assert sink.last_words["reason"] == "history-lost"
    assert world.hub.floor == world.machine.revision == other.revision
    with pytest.raises(HistoryGoneError):
        world.watch("anna", since=1)


def test_a_long_history_that_is_lost_holds_up_nothing() -> None:
    world = World()
    world.changes.clear()
    hub = Hub(world.machine, SETTINGS)
    for revision in range(50_000):
        hub.publish(Change(revision, (Event("t", f"/groups/g{revision}", {"user": f"u{revision}"}),)))
    began = time.thread_time()
    hub.restored()
    restored_seconds = time.thread_time() - began
    assert restored_seconds < 0.002, "it is freed bit by bit, with the changes that follow"
    for revision in range(501):
        hub.publish(Change(revision, ()))
    assert not hub._crumbling


def test_the_end_of_a_session_ends_its_streams_alone() -> None:
    world = World()
    _, annas = world.watch("anna")
    _, bens = world.watch("ben")
    world.do(c.RevokeSession("anna", "another", 0))
    assert not annas.ended
    world.do(c.RevokeSession("anna", "s-anna", 0))
    assert annas.ended and annas.last_words["reason"] == "session-ended"
    world.do(c.ChangePassword("ben", "hash", 0))
    assert bens.ended and bens.messages()[-1]["events"][0]["type"] == "user.sessions_voided"
    assert len(world.hub) == 0


def test_an_expired_session_ends_its_streams() -> None:
    world = World()
    watcher, sink = world.watch("anna")
    world.hub.end_sessions(watcher.session.expires_at_ms - 1, lambda _: True)
    assert not sink.ended
    world.hub.end_sessions(watcher.session.expires_at_ms, lambda _: True)
    assert sink.ended


def test_heartbeats_say_how_far_the_stream_is_and_find_who_left() -> None:
    world = World()
    watcher, sink = world.watch("carl")
    _, left = world.watch("carl", sink=Remembering(left=True))
    world.group("boats", "anna", "ben")
    world.hub.sweep()
    for slot in range(HEARTBEAT_SLOTS):
        world.hub.heartbeat(slot)
    assert sink.parts[-1] == b": hb\nid: %d\n\n" % world.machine.revision
    assert watcher.revision == world.machine.revision
    assert left.ended
    assert len(world.hub) == 1


def test_ten_thousand_watchers_cost_what_their_events_cost() -> None:
    """Counted, not timed: an event in one group touches that group's watchers and nobody else."""
    world = World()
    world.group("boats", "anna")
    world.group("ships", "ben")
    others = [world.watch("ben", "/groups/ships")[1] for _ in range(5_000)]
    others += [world.watch("carl")[1] for _ in range(5_000)]
    _, annas = world.watch("anna")
    asked = 0
    real = world.hub._may_see  # type: ignore[attr-defined]

    def counting(user: str, path: str) -> bool:
        nonlocal asked
        asked += 1
        return real(user, path)

    world.hub._may_see = counting  # type: ignore[method-assign]
    world.publish("boats", "hull", "anna")
    assert asked == 1
    assert len(annas.events()) == 1
    assert not any(sink.writes > 1 for sink in others), "nothing but where the stream begins"


_ACTIONS = st.sampled_from(
    ["create", "request", "accept", "reject", "leave", "kick", "promote", "publish", "remove", "delete"]
)
_STEPS = st.lists(
    st.tuples(_ACTIONS, st.sampled_from(["g", "gg"]), st.sampled_from(USERS), st.sampled_from(USERS)),
    max_size=40,
)
_PREFIXES = st.lists(
    st.sampled_from(
        ["/", "/groups", "/groups/g", "/groups/gg", "/groups/g/files", "/groups/g/members/ben", "/users/anna"]
    ),
    min_size=1,
    max_size=3,
)


def _command(action: str, group: str, actor: str, user: str) -> c.AnyCommand:
    match action:
        case "create":
            return c.CreateGroup(group, actor, 0)
        case "request":
            return c.RequestJoin(group, actor, 0)
        case "accept":
            return c.AcceptRequest(group, user, actor, 0)
        case "reject":
            return c.RejectRequest(group, user, actor, 0)
        case "leave":
            return c.LeaveGroup(group, actor, 0, 0)
        case "kick":
            return c.KickMember(group, user, actor, 0, 0)
        case "promote":
            return c.PromoteMember(group, user, actor, 0)
        case "publish":
            return c.PublishFile(
                group, f"of {user}", "file", 1, 1, 16384, "sha256", "0" * 64, True, actor, 0, 0
            )
        case "remove":
            return c.RemoveFile(group, f"of {user}", actor, 0, 0)
        case _:
            return c.DeleteGroup(group, actor, 0, 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=_STEPS, prefixes=_PREFIXES, user=st.sampled_from(USERS), join=st.integers(0, 40))
def test_streams_against_a_naive_reading(
    steps: list[tuple[str, str, str, str]], prefixes: list[str], user: str, join: int
) -> None:
    """In order, each once, none missing; with members and roles tracked from the events themselves."""
    world = World()
    begun = world.machine.revision
    _, sink = world.watch(user, *prefixes)
    expected: list[tuple[int, str, str]] = []
    roles: dict[str, str] = {}  # group: the user's
    taken = len(world.changes)
    late: tuple[int, Remembering] | None = None
    for number, (action, group, actor, other) in enumerate(steps):
        if number == join:
            since = world.machine.revision
            late = since, world.watch(user, *prefixes)[1]
        world.do(_command(action, group, actor, other))
        for change in world.changes[taken:]:
            for event in change.events:
                parts = event.path.split("/")
                if parts[1:2] == ["groups"] and parts[3:] == ["members", user]:
                    if event.type == "member.removed":
                        roles.pop(parts[2], None)
                    else:
                        roles[parts[2]] = event.value["role"]
                if event.type == "group.deleted":
                    roles.pop(parts[2], None)
            for event in change.events:
                if _visible(event.path, user, roles) and any(
                    event.path == p or event.path.startswith(p.rstrip("/") + "/") for p in prefixes
                ):
                    expected.append((change.revision, event.type, event.path))
        taken = len(world.changes)
    assert sink.events() == expected
    revisions = [message["revision"] for message in sink.messages()]
    assert revisions == sorted(set(revisions))
    if late is not None:
        assert late[1].events() == [event for event in expected if event[0] > late[0]]
    _, resumed = world.watch(user, *prefixes, since=begun)
    now_visible = {g for g in ("g", "gg") if g in roles}
    told = [e for e in expected if e[2].split("/")[2] in now_visible or len(e[2].split("/")) == 3]
    assert [e for e in resumed.events() if e in told] == [e for e in told if _visible(e[2], user, roles)], (
        "resumed, nothing that is still one's to see is missing"
    )


def _visible(path: str, user: str, roles: dict[str, str]) -> bool:
    parts = path.split("/")[1:]
    if parts[0] != "groups":
        return parts[0] == "keys" or parts[1] == user
    if len(parts) == 2:
        return True
    if parts[2] == "join-requests":
        return parts[3] == user or roles.get(parts[1]) in ("admin", "owner")
    return parts[1] in roles or parts[2:] == ["members", user]


@pytest.mark.parametrize(
    ("prefix", "normal"),
    [
        ("/", ""),
        ("/groups/a/", "/groups/a"),
        ("", None),
        ("a", None),
        ("/a//b", None),
        ("/" + "x" * 2000, None),
    ],
)
def test_prefixes(prefix: str, normal: str | None) -> None:
    assert normal_prefix(prefix) == normal
