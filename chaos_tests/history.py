"""The history of a run: what clients saw, what was done to them, on one clock.

Owned here: the records and their JSONL form. Written as things happen (a call when it is made, its end
when it ends), so that a run that dies leaves what it saw. The clock is the rig's monotonic clock, in
nanoseconds from the run's start.

Ends of an operation: `ok` (acknowledged), `refused` (the system answered no: an observation of its
state), `fail` (certainly did not happen), `unknown` (may or may not have happened, or may yet).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import orjson

End = Literal["ok", "refused", "fail", "unknown"]
FOREVER_NS = 1 << 62


class Operation(msgspec.Struct, kw_only=True):
    """One call of one client, from call to end. `key` is the thing it is about (a membership, a file)."""

    id: int
    client: str
    name: str
    key: str
    node: str
    input: Any
    call_ns: int
    deadline_ns: int
    end: End = "unknown"
    end_ns: int = FOREVER_NS
    output: Any = None
    revision: int | None = None
    request_id: str = ""
    detail: str = ""

    @property
    def open(self) -> bool:
        """True when it may take effect at any time after its call."""
        return self.end == "unknown"


class Fault(msgspec.Struct, kw_only=True):
    kind: str
    target: str
    begin_ns: int
    end_ns: int
    bit: bool = False  # a demonstrable effect was seen
    detail: str = ""
    gone_ns: tuple[int, int] = (0, 0)  # from when to when its targets were down, where that is told
    wrong: str = ""  # what the product did under it and must not do


class Sample(msgspec.Struct, kw_only=True, gc=False):
    """What a node said of itself: from its status, its log or its digests."""

    at_ns: int
    node: str
    role: str
    term: int
    revision: int = 0
    remembered: str = ""  # the latest request: a refusal is remembered too, and does not raise the revision
    digest: str = ""
    leader: str | None = None


class Watched(msgspec.Struct, kw_only=True):
    """One message of one watch stream."""

    at_ns: int
    watcher: str
    node: str
    prefix: str
    revision: int
    events: list[dict[str, Any]]
    resumed: bool = False  # first message after a re-listing: a gap before it is allowed


class Transfer(msgspec.Struct, kw_only=True):
    """The life of one download."""

    peer: str
    group: str
    name: str
    begin_ns: int
    end_ns: int = FOREVER_NS
    size_bytes: int = 0
    wanted_sha256: str = ""
    got_sha256: str = ""
    exit_code: int | None = None
    can_finish: bool = True
    progress: list[tuple[int, int]] = []  # (at_ns, done_bytes)


class Presence(msgspec.Struct, kw_only=True, gc=False):
    """A peer in the eyes of the trackers: seen or not in a linearizable reading of a swarm."""

    at_ns: int
    call_ns: int
    peer_id: str
    seen: bool


class Life(msgspec.Struct, kw_only=True, gc=False):
    """When a peer process could announce: from its start to its silence (kill, pause, cut)."""

    peer_id: str
    from_ns: int
    to_ns: int
    peer: str = ""  # its name in the rig


class Load(msgspec.Struct, kw_only=True, gc=False):
    """How busy the machine itself was: runnable processes (as the kernel averages them over a minute), and by
    how much a nap overslept in the rig."""

    at_ns: int
    runnable: float
    late_seconds: float


class History(msgspec.Struct, kw_only=True):
    seed: int = 0
    operations: list[Operation] = []
    faults: list[Fault] = []
    samples: list[Sample] = []
    watched: list[Watched] = []
    transfers: list[Transfer] = []
    presences: list[Presence] = []
    lives: list[Life] = []
    loads: list[Load] = []
    end_ns: int = 0
    healed_ns: int = 0


_KINDS: dict[str, tuple[str, type]] = {
    "operation": ("operations", Operation),
    "fault": ("faults", Fault),
    "sample": ("samples", Sample),
    "watched": ("watched", Watched),
    "transfer": ("transfers", Transfer),
    "presence": ("presences", Presence),
    "life": ("lives", Life),
    "load": ("loads", Load),
}
_NAMES = {kind: name for name, (_, kind) in _KINDS.items()}


class Recorder:
    """Writes a history as it happens and keeps it for the checkers."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self.history = History(seed=seed)
        self._start_ns = time.monotonic_ns()
        self._file = path.open("wb") if path else None
        self._next_id = 0
        self._write("run", {"seed": seed})

    def now_ns(self) -> int:
        return time.monotonic_ns() - self._start_ns

    def call(
        self,
        client: str,
        name: str,
        key: str,
        node: str,
        value: Any,
        deadline_seconds: float,
        request_id: str = "",
    ) -> Operation:
        now = self.now_ns()
        operation = Operation(
            id=self._next_id, client=client, name=name, key=key, node=node, input=value, call_ns=now,
            deadline_ns=now + int(deadline_seconds * 1e9), request_id=request_id,
        )  # fmt: skip
        self._next_id += 1
        self.history.operations.append(operation)
        self._write("call", operation)
        return operation

    def end(
        self,
        operation: Operation,
        end: End,
        output: Any = None,
        revision: int | None = None,
        detail: str = "",
    ) -> None:
        """Close an operation. An `unknown` one has an end for its deadline, but stays open in effect."""
        operation.end, operation.output, operation.revision, operation.detail = end, output, revision, detail
        operation.end_ns = self.now_ns()
        self._write("operation", operation)

    def add(self, record: Fault | Sample | Watched | Transfer | Presence | Life | Load) -> None:
        kind = _NAMES[type(record)]
        getattr(self.history, _KINDS[kind][0]).append(record)
        self._write(kind, record)

    def close(self) -> History:
        self.history.end_ns = self.now_ns()
        self._write("end", {"end_ns": self.history.end_ns, "healed_ns": self.history.healed_ns})
        if self._file:
            self._file.close()
            self._file = None
        return self.history

    def _write(self, kind: str, record: Any) -> None:
        if self._file:
            self._file.write(orjson.dumps({"record": kind, **msgspec.to_builtins(record)}) + b"\n")


def read(path: Path) -> History:
    """Read a JSONL history back. Calls that never ended are `unknown`. Raises `ValueError` on damage."""
    history = History()
    open_calls: dict[int, Operation] = {}
    for record in _lines(path):
        kind = record.pop("record")
        if kind == "run":
            history.seed = record["seed"]
        elif kind == "call":
            operation = msgspec.convert(record, Operation)
            open_calls[operation.id] = operation
        elif kind == "end":
            history.end_ns, history.healed_ns = record["end_ns"], record["healed_ns"]
        else:
            name, struct = _KINDS[kind]
            value = msgspec.convert(record, struct)
            if isinstance(value, Operation):
                open_calls.pop(value.id, None)
            getattr(history, name).append(value)
    history.operations.extend(open_calls.values())
    history.operations.sort(key=lambda operation: operation.id)
    return history


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError:
                if line.endswith(b"\n"):
                    raise
                return  # a torn last line of a run that died
