"""The clients of a simulated cluster: reads and writes without end, retried as a careful client would.

Owned here: what is asked for, where, how often again, and what an answer is checked against: what the same clients were told
before. What all nodes must agree on is the world's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos_tests.simulation.process import CallerGoneError, Process
from chaos_tests.simulation.replica import encode_command
from cluster.consensus import Applied, ProposalEnd, Rejected
from cluster.raft.core import RaftCore

if TYPE_CHECKING:
    from chaos_tests.simulation.world import World

DEADLINE_SECONDS = 3.0
COUNT = 7


@dataclass(slots=True)
class Call:
    """One operation of a client, from its first attempt to its last."""

    kind: str
    command: bytes
    request: str
    floor: int
    began: float
    due: float = 0.0
    process: Process | None = None
    core: RaftCore | None = None
    ended: bool = False
    attempts: int = 0
    then: Callable[[], None] = lambda: None


class Clients:
    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.chance
        self._clock = world.clock
        self._requests = 0
        self.calls: list[Call] = []
        self.acknowledged: dict[bytes, int] = {}
        self.floor = 0  # the highest revision anybody was told of

    def begin(self) -> None:
        for number in range(COUNT):
            self._clock.later(0.5 + 0.01 * number, self._turn)

    def _turn(self) -> None:
        if self._world.faults_over:
            return
        roll = self._chance.random()
        if roll < 0.25:
            self._attempt(Call("read", b"", "", self.floor, self._clock.now), self._turn)
            return
        self._requests += 1
        request = f"r{self._requests}"
        key = f"k{self._chance.randrange(12)}"
        size = self._chance.choice([4, 40, 400])
        if roll < 0.85:
            command = encode_command(("put", request, key, request.ljust(size, ".")))
        elif roll < 0.98:
            request, command = "", encode_command(("bump", "", key, request))
        else:
            request, command = "", encode_command(("refuse", "", key, ""))
        kind = "refuse" if b"refuse" in command else "write"
        self._attempt(Call(kind, command, request, self.floor, self._clock.now), self._turn)

    def _attempt(self, call: Call, then: Callable[[], None]) -> None:
        awake = [process for process in self._world.processes.values() if process.up]
        if not awake:
            self._clock.later(0.2, lambda: self._attempt(call, then))
            return
        process = self._chance.choice(awake)
        core, runtime = process.core, process.runtime
        assert core is not None and runtime is not None
        call.process, call.core, call.ended = process, core, False
        call.attempts += 1
        call.due = float("inf")
        self.calls.append(call)
        call.then = then

        patience = self._chance.choice([0.8, 1.5, DEADLINE_SECONDS])

        def ask() -> None:
            call.due = self._clock.now + patience
            due = runtime.now() + patience
            if call.kind == "read":
                core.barrier(due, lambda confirmed: self._read(call, confirmed))
            else:
                core.submit(call.command, due, lambda end: self._written(call, end))

        process.deliver(ask)

    def _finish(self, call: Call, seconds: float) -> None:
        call.ended = True
        self.calls = [other for other in self.calls if other is not call]
        self._clock.later(seconds, call.then)

    def _retry_later(self, call: Call) -> None:
        """An outcome that is not known, or a definite no: with a request id the same may be asked again."""
        if call.request and call.attempts < 12:
            call.ended = True
            self.calls = [other for other in self.calls if other is not call]
            then = call.then
            self._clock.later(self._chance.uniform(0.01, 0.3), lambda: self._attempt(call, then))
        else:
            self._finish(call, self._chance.uniform(0.01, 0.3))

    def _read(self, call: Call, confirmed: bool) -> None:
        if call.ended:
            return
        process = call.process
        if confirmed and process is not None and process.replica is not None and process.core is call.core:
            revision = process.replica.state.revision
            self._world.result.reads += 1
            if revision < call.floor:
                self._world.violation(
                    "stale read", f"{process.node_id} showed revision {revision}, {call.floor} was known"
                )
            self.floor = max(self.floor, revision)
            self._world.log("read", process.node_id, revision)
        else:
            self._world.bites["read_refused"] += 1
        self._finish(call, self._chance.expovariate(1 / self._world.rig.think_seconds))

    def _written(self, call: Call, end: ProposalEnd) -> None:
        if call.ended:
            if call.core is not None and call.process is not None and call.core is call.process.core:
                self._world.violation("answered twice", repr(end))
            return
        if isinstance(end, Applied):
            self._acknowledged(call, end)
            self._finish(call, self._chance.expovariate(1 / self._world.rig.think_seconds))
        else:
            self._world.bites["rejected" if isinstance(end, Rejected) else "unknown"] += 1
            self._retry_later(call)
        if self._chance.random() < 0.02:
            self._world.bites["caller_gone"] += 1
            raise CallerGoneError

    def _acknowledged(self, call: Call, end: Applied) -> None:
        if call.kind == "refuse":
            return
        revision = end.result
        self._world.log("acknowledged", call.request, revision)
        self._world.result.acknowledged += 1
        if not isinstance(revision, int):
            self._world.violation("wrong answer", f"{call.request}: {end}")
        if revision <= call.floor:
            self._world.violation("order broken", f"revision {revision} given after {call.floor} was known")
        if self._world.contents.get(revision) != call.command:
            self._world.violation("another's answer", f"revision {revision} is not what was asked for")
        self.acknowledged[call.command] = revision
        self.floor = max(self.floor, revision)

    def check(self) -> None:
        for call in self.calls:
            late = self._clock.now - call.due
            process = call.process
            if (
                late > 1.0
                and not call.ended
                and process is not None
                and process.awake
                and call.core is process.core
            ):
                self._world.violation(
                    "a caller is left waiting", f"{call.kind} at {process.node_id}, {late:.1f} s late"
                )

    def forget(self, process: Process) -> None:
        """The connection to a process that died breaks: its callers learn at once that they will not learn more."""
        for call in self.calls:
            if call.process is process and not call.ended:
                self._retry_later(call)
