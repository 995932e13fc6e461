"""Who watches what, and what each is told: the hub between the state machine and open event streams.

Owned here: the kept history, the index of watchers, rights to see an event, and cutting off who is too
slow. Left to others: HTTP (`handlers/watching.py` gives each watcher a `Sink`), and what an event says
(`state_machine/events.py`).

Theory of operation. The machine calls `publish` once for each revision, in order. Every event is about
one path; who may see it follows from the path alone:

    /groups/{g}                       everyone (groups are listed publicly)
    /groups/{g}/join-requests/{u}     the group's admins, and u
    /groups/{g}/members/{u}           members, and u (so that who is removed learns it)
    /groups/{g}/...                   members
    /users/{u}/...                    u
    /keys/...                         everyone

A watcher asked for prefixes. Narrow ones (`/groups/{g}` and below, `/users/{u}`, `/keys`) are found by
walking the event path's ancestors. Broad ones (`/`, `/groups`, `/users`) are not visited for every
event: of a group's event, either its members or the users who watch broadly are walked, whichever are
fewer. So an event costs what it is delivered to, however many watch. A message is encoded once for all
who see the same events of a revision.

Rights are asked of the state while the event is being applied, so a removed member's stream shows the
removal and nothing of the group after it. When a session ends, its streams end.

The history is a ring bounded by changes and bytes. Its rights are those of the reader now: who resumes
sees of the past what a member may see, and nothing of groups that were left since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import orjson

from cluster.api.tokens import SessionClaims
from cluster.settings import ServiceSettings
from state_machine.events import Change, Event
from state_machine.machine import StateMachine

Cut = Literal["slow", "session-ended", "history-lost", "stopping"]

_HINTS: Final[dict[Cut, str]] = {
    "slow": "This stream was read too slowly. Watch again from the last revision; if that is refused "
    "(410), list again first.",
    "session-ended": "The session has ended. Sign in again.",
    "history-lost": "This node installed a snapshot: what happened meanwhile is not known here. List again, "
    "then watch.",
    "stopping": "This node is stopping. Watch from the last revision at another node.",
}
HEARTBEAT_SLOTS: Final = 10
_PAST_QUEUES_MAX: Final = 8  # how many times the queue a stream may begin with
_BROAD: Final = ("", "/groups", "/users")
_CRUMBLE_CHANGES: Final = 100
_EVENT_BYTES: Final = 200  # what an event costs in memory beside its value, about
_FIELD_BYTES: Final = 120  # what a field of its value costs


class Sink(Protocol):
    """Where a watcher's bytes go. Never blocks: what cannot leave is queued, and counted."""

    def write(self, data: bytes) -> None: ...

    def queued_bytes(self) -> int: ...

    def gone(self) -> bool:
        """The reader has left; nothing arrives any more."""

    def end(self) -> None:
        """No more will be written; close when the rest has left."""


@dataclass(slots=True, eq=False)
class Watcher:
    session: SessionClaims
    prefixes: tuple[str, ...]
    sink: Sink
    revision: int  # everything up to here was written
    queue_bytes_max: int  # what may wait; more for one that began with much of the past
    slot: int
    ended: bool = False

    @property
    def user(self) -> str:
        return self.session.user


class HistoryGoneError(Exception):
    """The asked revision lies before the kept history, or so far back that listing costs less."""


def normal_prefix(prefix: str) -> str | None:
    """A resource path without a slash at its end ("" for "/"); None when it is none."""
    if not prefix.startswith("/") or "//" in prefix or len(prefix) > 1024:
        return None
    return prefix.rstrip("/")


def frame(revision: int, events: Iterable[Event]) -> bytes:
    """One server-sent event (WHATWG HTML, 9.2.5)."""
    document = {
        "revision": revision,
        "events": [{"type": e.type, "path": e.path, "value": e.value} for e in events],
    }
    return b"id: %d\ndata: %b\n\n" % (revision, orjson.dumps(document))


class Hub:
    """All watchers of this node."""

    def __init__(self, machine: StateMachine, settings: ServiceSettings) -> None:
        self._machine = machine
        self._settings = settings
        self._kept: deque[tuple[Change, int]] = deque()
        self._kept_bytes = 0
        self._crumbling: deque[tuple[Change, int]] = deque()  # a history that was lost, freed bit by bit
        self._floor = machine.revision  # everything after it is kept
        self._watchers: set[Watcher] = set()
        # Ten thousand heartbeats at once would hold the loop for longer than Raft can bear: they are sent
        # in turns, a slot after the other.
        self._slots: list[set[Watcher]] = [set() for _ in range(HEARTBEAT_SLOTS)]
        self._next_slot = 0
        self._narrow: dict[str, set[Watcher]] = {}
        self._broad: dict[str, set[Watcher]] = {}  # user: watchers of "/" or a first segment
        self._by_user: dict[str, set[Watcher]] = {}
        self.delivered = 0
        self.cuts: dict[str, int] = dict.fromkeys(_HINTS, 0)
        self._on_revision: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._watchers)

    @property
    def floor(self) -> int:
        return self._floor

    def when_revision(self, callback: Callable[[], None] | None) -> None:
        """Call after each change, for those who wait for a revision."""
        self._on_revision = callback

    # --- history --------------------------------------------------------------------------------

    def publish(self, change: Change) -> None:
        """From the machine, while it applies: the state is that of `change.revision`."""
        for _ in range(min(_CRUMBLE_CHANGES, len(self._crumbling))):
            self._crumbling.pop()
        if change.events:
            self._keep(change)
            if self._watchers:
                self._deliver(change)
        if self._on_revision is not None:
            self._on_revision()

    def restored(self) -> None:
        """The state was replaced by a snapshot: nobody knows what happened in between."""
        # Freeing a hundred thousand changes at once would hold up everything for tens of milliseconds.
        self._crumbling, self._kept = self._kept, deque()
        self._kept_bytes = 0
        self._floor = self._machine.revision
        for watcher in list(self._watchers):
            self.cut(watcher, "history-lost")
        if self._on_revision is not None:
            self._on_revision()

    def _keep(self, change: Change) -> None:
        size = 0
        for event in change.events:  # about; counting exactly would cost more than it tells
            size += _EVENT_BYTES + 2 * len(event.path) + _FIELD_BYTES * len(event.value or ())
        self._kept.append((change, size))
        self._kept_bytes += size
        settings = self._settings
        while (
            len(self._kept) > settings.watch_kept_changes_max
            or self._kept_bytes > settings.watch_kept_bytes_max
        ):
            oldest, size = self._kept.popleft()
            self._kept_bytes -= size
            self._floor = oldest.revision

    # --- watchers -------------------------------------------------------------------------------

    def add(
        self, session: SessionClaims, prefixes: tuple[str, ...], sink: Sink, since: int | None
    ) -> Watcher:
        """Start a stream after revision `since` (None: now). What is kept of the past is written at once,
        then an id alone that says where the stream stands: nobody's heartbeat is waited for.
        Raises `HistoryGoneError`. The node must have reached `since`."""
        revision = self._machine.revision
        if since is None:
            since = revision
        assert since <= revision, "wait for the revision before"
        if since < self._floor:
            raise HistoryGoneError
        queue_bytes_max = self._settings.watch_queue_bytes_max
        self._next_slot = (self._next_slot + 1) % HEARTBEAT_SLOTS
        watcher = Watcher(session, prefixes, sink, revision, queue_bytes_max, self._next_slot)
        past: list[bytes] = []
        for data in self._past(watcher, since):
            watcher.queue_bytes_max += len(data)
            if watcher.queue_bytes_max > (_PAST_QUEUES_MAX + 1) * queue_bytes_max:
                raise HistoryGoneError
            past.append(data)
        sink.write(b"".join((*past, b"id: %d\n\n" % revision)))
        self._watchers.add(watcher)
        self._slots[watcher.slot].add(watcher)
        self._by_user.setdefault(watcher.user, set()).add(watcher)
        for prefix in prefixes:
            if prefix in _BROAD:
                self._broad.setdefault(watcher.user, set()).add(watcher)
            else:
                self._narrow.setdefault(prefix, set()).add(watcher)
        return watcher

    def remove(self, watcher: Watcher) -> None:
        """Idempotent."""
        watcher.ended = True
        if watcher not in self._watchers:
            return
        self._watchers.remove(watcher)
        self._slots[watcher.slot].discard(watcher)
        _discard(self._by_user, watcher.user, watcher)
        for prefix in watcher.prefixes:
            _discard(self._narrow, prefix, watcher)
        _discard(self._broad, watcher.user, watcher)

    def cut(self, watcher: Watcher, reason: Cut) -> None:
        """End a stream with a last event that says why, and what to do next."""
        if watcher.ended:
            return
        self.remove(watcher)
        self.cuts[reason] += 1
        document = {"revision": watcher.revision, "events": [], "reason": reason, "hint": _HINTS[reason]}
        watcher.sink.write(b"event: end\ndata: %b\n\n" % orjson.dumps(document))
        watcher.sink.end()

    def sweep(self) -> None:
        """Forget the watchers whose readers have left."""
        for watcher in [watcher for watcher in self._watchers if watcher.sink.gone()]:
            self.remove(watcher)
            watcher.sink.end()

    def heartbeat(self, slot: int) -> None:
        """To all of a slot, the same bytes: this node hears a quorum, and has told everything up to a
        revision."""
        revision = self._machine.revision
        data = b": hb\nid: %d\n\n" % revision
        for watcher in list(self._slots[slot]):
            if watcher.sink.queued_bytes() > watcher.queue_bytes_max:
                self.cut(watcher, "slow")
                continue
            watcher.revision = revision
            watcher.sink.write(data)

    def end_sessions(self, now_ms: int, lives: Callable[[SessionClaims], bool]) -> None:
        """End the streams whose session has expired or was ended."""
        for watcher in list(self._watchers):
            if now_ms >= watcher.session.expires_at_ms or not lives(watcher.session):
                self.cut(watcher, "session-ended")

    def stop(self) -> None:
        for watcher in list(self._watchers):
            self.cut(watcher, "stopping")

    # --- delivery -------------------------------------------------------------------------------

    def _past(self, watcher: Watcher, since: int) -> Iterable[bytes]:
        if self._kept and since < self._kept[-1][0].revision:
            for change, _ in self._kept:
                if change.revision > since:
                    events = [event for event in change.events if self._sees(watcher, event)]
                    if events:
                        yield frame(change.revision, events)

    def _sees(self, watcher: Watcher, event: Event) -> bool:
        return _asked_for(watcher, event.path) and self._may_see(watcher.user, event.path)

    def _may_see(self, user: str, path: str) -> bool:
        parts = path.split("/", 4)
        match parts:
            case ["", "groups", _]:
                return True
            case ["", "groups", group, "join-requests", who]:
                member = self._machine.state.members.get(group, user)
                return who == user or (member is not None and member.role != "member")
            case ["", "groups", _, "members", who] if who == user:
                return True
            case ["", "groups", group, *_]:
                return self._machine.state.members.get(group, user) is not None
            case ["", "users", who, *_]:
                return who == user
            case ["", "keys", *_]:
                return True
        return False

    def _deliver(self, change: Change) -> None:
        seen: dict[Watcher, list[int]] = {}
        ended: list[str] = []
        for number, event in enumerate(change.events):
            for watcher in self._candidates(event.path):
                if self._may_see(watcher.user, event.path):
                    numbers = seen.setdefault(watcher, [])
                    if not numbers or numbers[-1] != number:  # found by two of its prefixes
                        numbers.append(number)
            if event.type in ("user.sessions_voided", "session.revoked"):
                ended.append(event.path.split("/")[2])
        frames: dict[tuple[int, ...], bytes] = {}
        for watcher, numbers in seen.items():
            chosen = tuple(numbers)
            data = frames.get(chosen)
            if data is None:
                data = frames[chosen] = frame(change.revision, [change.events[n] for n in chosen])
            queued = watcher.sink.queued_bytes()
            if queued and queued + len(data) > watcher.queue_bytes_max:
                self.cut(watcher, "slow")
                continue
            watcher.revision = change.revision
            watcher.sink.write(data)
            self.delivered += 1
        for user in ended:
            for watcher in list(self._by_user.get(user, ())):
                if not self._lives(watcher.session):
                    self.cut(watcher, "session-ended")

    def _lives(self, session: SessionClaims) -> bool:
        state = self._machine.state
        row = state.users.get(session.user)
        return (
            row is not None
            and row.session_epoch == session.epoch
            and state.revoked_sessions.get(session.user, session.session_id) is None
        )

    def _candidates(self, path: str) -> Iterator[Watcher]:
        """Who asked for this path, and may be among those who see it; some of them twice."""
        end = len(path)
        while end > 0:
            yield from self._narrow.get(path[:end], ())
            end = path.rfind("/", 0, end)
        broad = self._broad
        if not broad:
            return
        users: Iterable[str] = broad
        match path.split("/", 4):
            case ["", "groups", group, kind, *rest]:
                members = self._machine.state.members.rows(group)
                if len(members) < len(broad):
                    # Whom the event is about need not be a member (any more).
                    concerned = rest if kind in ("members", "join-requests") else ()
                    users = {*members, *concerned}
            case ["", "users", user, *_]:
                users = (user,)
        for user in users:
            for watcher in broad.get(user, ()):
                if _asked_for(watcher, path):
                    yield watcher


def _asked_for(watcher: Watcher, path: str) -> bool:
    return any(
        path.startswith(prefix) and (len(path) == len(prefix) or path[len(prefix)] == "/")
        for prefix in watcher.prefixes
    )


def _discard(index: dict[str, set[Watcher]], key: str, watcher: Watcher) -> None:
    watchers = index.get(key)
    if watchers is not None:
        watchers.discard(watcher)
        if not watchers:
            del index[key]
