"""A whole cluster in one process and in virtual time: the real node code over simulated clock, network and disks.

Owned here: processes and their lives, the clients, the operator, and what is checked at every step. Which faults
come when is `weather.py`'s; running many worlds is `run.py`'s.
"""

from __future__ import annotations

import hashlib
import random
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import msgspec

from chaos_tests.simulation.clock import Clock, Event, ProcessRuntime
from chaos_tests.simulation.disk import ProcessEnds, SimulatedDisk, SimulatedSyncer
from chaos_tests.simulation.network import Network, SimulatedLinks
from chaos_tests.simulation.replica import SimulatedReplica, encode_command
from chaos_tests.simulation.rig import Rig
from cluster.consensus import Applied, ConsensusStartError, NodeInfo, ProposalEnd, Rejected
from cluster.raft.core import LinkEvents, RaftCore
from cluster.raft.entries import CONFIGURATION
from cluster.raft.messages import Message, Vote
from cluster.raft.settings import RaftSettings

DEADLINE_SECONDS = 3.0
CLUSTER = "simulated"
CLIENTS = 7


class CallerGoneError(Exception):
    """Raised out of a caller's callback, as a future that was cancelled does."""


class ViolationError(BaseException):
    """The run is over: something that must never happen has happened."""


def node_info(node_id: str) -> NodeInfo:
    return NodeInfo(node_id, f"{node_id}:7100", f"http://{node_id}:7000", f"key-of-{node_id}")


class Process:
    """One node's folder, and the process on it while there is one."""

    def __init__(self, world: World, node_id: str, founders: tuple[NodeInfo, ...]) -> None:
        self.world = world
        self.node_id = node_id
        self.founders = founders
        self.disk = SimulatedDisk(random.Random(world.chance.getrandbits(64)), world.bites)
        self.runtime: ProcessRuntime | None = None
        self.syncer: SimulatedSyncer | None = None
        self.core: RaftCore | None = None
        self.replica: SimulatedReplica | None = None
        self.links: SimulatedLinks | None = None
        self.started_once = False
        self.damaged = False
        self.safe_index = 0  # what it held when the process ended
        self.refused: str | None = None  # why it would not start
        self.ended: str | None = None  # why it ended itself
        self.checked_commit = 0
        self.checked_change = (0, 0)  # (term, index) of the latest change it made as leader

    @property
    def up(self) -> bool:
        return self.core is not None

    @property
    def held_index(self) -> int:
        """Up to where it has everything on its disk, in the log or in a snapshot."""
        if self.core is None:
            return self.safe_index
        meta = self.core.store.latest()
        return max(self.core.guard.journal.synced_index, meta.index if meta is not None else 0)

    @property
    def awake(self) -> bool:
        return self.core is not None and self.runtime is not None and not self.runtime.paused

    def start(self) -> None:
        world = self.world
        syncer = SimulatedSyncer(
            world.clock, random.Random(world.chance.getrandbits(64)), lambda: world.kill(self)
        )
        runtime = ProcessRuntime(world.clock, world.chance, syncer)
        syncer.deliver = runtime.call_soon
        runtime.around = self._around
        replica = world.new_replica(self)
        self.runtime, self.syncer, self.replica = runtime, syncer, replica
        settings = world.settings(self)
        self.checked_commit = 0
        self.ended = None
        try:
            self.core = RaftCore(
                settings,
                self.disk,
                runtime,
                self._make_links,
                replica,
                world.rig.corrections,
                world.rig.open_journal,
            )
            self.started_once = True
            self.core.on_fatal(self._fatal)
            self.core.begin()
        except ConsensusStartError as error:
            self._gone()
            if "start the node again" in str(error):
                # The disk failed, or had no room, while it was read: nothing is known to be wrong with what it holds.
                world.bites["start_failed_by_disk"] += 1
                world.clock.later(1.0, lambda: world.restart(self))
            else:
                world.bites["refused_to_start"] += 1
                self.refused = str(error)
                if not self.damaged:
                    world.violation("refused to start without damage", f"{self.node_id}: {error}")
            world.log("refused", self.node_id)
            return
        except ProcessEnds:
            self._gone()
            world.log("ended at start", self.node_id)
            return
        world.network.start(self)
        world.log("start", self.node_id)
        if self.core.guard.last_index < self.safe_index and not self.damaged:
            world.violation(
                "synced entries are gone after a restart",
                f"{self.node_id} had {self.safe_index}, has {self.core.guard.last_index}",
            )
        changes = [index for command, index, _ in self.core.guard.journal[:] if command[:1] == CONFIGURATION]
        if changes and changes[-1] > max(1, self.core.membership.current_index):
            world.violation(
                "a change in the log is forgotten by a restart", f"{self.node_id} at index {changes[-1]}"
            )

    def _make_links(self, events: LinkEvents) -> SimulatedLinks:
        self.links = SimulatedLinks(self.world.network, self.node_id)
        return self.links

    def _gone(self) -> None:
        if self.runtime is not None:
            self.runtime.alive = False
        if self.syncer is not None:
            self.syncer.alive = False
        self.core = self.runtime = self.syncer = self.links = None

    def stop(self) -> None:
        """As `kill -9` does: what the kernel has stays."""
        if self.core is not None:
            self.safe_index = self.held_index
        self._gone()
        self.disk.disarm()
        self.world.network.stop(self.node_id)

    def _fatal(self, reason: str) -> None:
        self.ended = reason
        self.world.node_ended(self, reason)

    def _around(self, callback: Callable[[], None]) -> None:
        world = self.world
        try:
            callback()
        except CallerGoneError:
            pass  # the loop logs it and goes on
        except ViolationError:
            raise
        except ProcessEnds:
            world.kill(self)
            return
        except Exception:
            world.violation("exception", f"{self.node_id}: {traceback.format_exc()}")
        if self.core is not None:
            world.check(self)

    # -- Endpoint

    def wants(self, node_id: str) -> bool:
        return self.links is not None and node_id in self.links.wanted

    def knows(self, node_id: str) -> bool:
        return self.core is not None and self.core.membership.knows(node_id) is not None

    def deliver(self, call: Callable[[], None]) -> None:
        if self.runtime is not None:
            self.runtime.run(Event(call))

    def connected(self, node_id: str) -> None:
        if self.core is not None:
            self.core.on_connected(node_id)

    def disconnected(self, node_id: str) -> None:
        if self.core is not None:
            self.core.on_disconnected(node_id)

    def message(self, node_id: str, message: Message) -> None:
        if self.core is not None:
            self.core.on_message(node_id, message)


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


@dataclass(slots=True)
class Result:
    seed: int
    weather: str
    virtual_seconds: float = 0.0
    acknowledged: int = 0
    reads: int = 0
    terms: int = 0
    violations: list[str] = field(default_factory=list)
    bites: Counter[str] = field(default_factory=Counter)
    digest: str = ""


class World:
    def __init__(self, seed: int, weather: str, rig: Rig, size: int, tuning: dict[str, Any]) -> None:
        self.result = Result(seed, weather)
        self.chance = random.Random(seed * 7919 + crc32(weather.encode()))
        self.rig = rig
        self.clock = Clock()
        self.bites: Counter[str] = self.result.bites
        self.network = Network(self.clock, random.Random(self.chance.getrandbits(64)), self.bites)
        self.network.watch = self._watch
        self.tuning = tuning
        self.processes: dict[str, Process] = {}
        self.leaders: dict[int, str] = {}
        self.entries: dict[int, tuple[int, int]] = {}
        self.chains: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}
        self.acknowledged: dict[bytes, int] = {}
        self.floor = 0  # the highest revision anybody was told of
        self.calls: list[Call] = []
        self.faults_over = False
        self.steady_term: int | None = None  # while set, leadership must not change
        self.no_snapshot_needed = False
        self.on_vote: Callable[[str, str], None] | None = None
        self._trace = hashlib.blake2b(digest_size=16)
        self._requests = 0
        self._node_count = size
        self._wishes: list[tuple[str, str]] = []
        self.lost_nodes: set[str] = set()
        self.damaged_node = ""
        founders = tuple(node_info(f"n{number}") for number in range(1, size + 1))
        for info in founders:
            self.processes[info.node_id] = Process(self, info.node_id, founders)
        for process in list(self.processes.values()):
            process.start()
        self.clock.later(0.3, self._operate)
        for number in range(CLIENTS):
            self.clock.later(0.5 + 0.01 * number, self._client_turn)

    # -- what the run is made of

    def settings(self, process: Process) -> RaftSettings:
        return RaftSettings(
            node=node_info(process.node_id),
            cluster_id=CLUSTER,
            founders=process.founders,
            may_create=not process.started_once,
            **self.tuning,
        )

    def new_replica(self, process: Process) -> SimulatedReplica:
        def applied(revision: int, chain: int, command: bytes) -> None:
            if self.chains.setdefault(revision, chain) != chain:
                self.violation("replicas differ", f"{process.node_id} at revision {revision}")
            self.contents.setdefault(revision, command)

        return SimulatedReplica(
            applied,
            lambda request: self.violation("request applied twice", f"{process.node_id}: {request}"),
            remembers=self.rig.remembers_requests,
            refuses_by_value=self.rig.refuses_by_value,
        )

    def log(self, *what: object) -> None:
        self._trace.update(repr((round(self.clock.now, 6), *what)).encode())

    def _watch(self, sender: str, receiver: str, data: bytes, message: Message) -> None:
        self._trace.update(b"%d" % crc32(data, crc32(f"{sender}>{receiver}@{self.clock.now:.6f}".encode())))

        if self.on_vote is not None and isinstance(message, Vote):
            self.on_vote(sender, receiver)

    def violation(self, kind: str, detail: str) -> None:
        self.result.violations.append(f"{kind} at {self.clock.now:.3f} s: {detail}")
        self.log("violation", kind)
        raise ViolationError(kind)

    # -- lives

    def kill(self, process: Process) -> None:
        if process.up:
            self.log("kill", process.node_id)
            self.bites["killed"] += 1
            self._forget_calls(process)
            process.stop()

    def lose_power(self, process: Process) -> None:
        if process.up:
            self.kill(process)
        self.log("power", process.node_id)
        self.bites["power_lost"] += 1
        process.disk.power_lost()

    def node_ended(self, process: Process, reason: str) -> None:
        """A node said that it must end: a supervisor starts it again later."""
        self.log("ended", process.node_id, reason)
        core = process.core
        if core is not None and core.membership.is_removed:
            self.bites["removed_node_told"] += 1
        elif "disk failed" in reason.lower():
            self.bites["ended_by_failed_sync"] += 1
            process.disk.after_failed_sync()
        else:
            self.violation("node ended itself", f"{process.node_id}: {reason}")
        self._forget_calls(process)
        process.stop()

    def restart(self, process: Process) -> None:
        if not process.up and process.refused is None and process.node_id in self.processes:
            if process.ended is not None and "removed" in process.ended:
                return
            process.start()

    def pause(self, process: Process, seconds: float) -> None:
        runtime = process.runtime
        if runtime is None or runtime.paused:
            return
        self.log("pause", process.node_id)
        self.bites["paused"] += 1
        runtime.paused = True

        def resume() -> None:
            if runtime.alive:
                runtime.resume()

        self.clock.later(seconds, resume)

    def _forget_calls(self, process: Process) -> None:
        """The connection to a process that died breaks: its callers learn at once that they will not learn more."""
        for call in self.calls:
            if call.process is process and not call.ended:
                self._retry_later(call)

    # -- clients

    def _client_turn(self) -> None:
        if self.faults_over:
            return
        roll = self.chance.random()
        if roll < 0.25:
            self._attempt(Call("read", b"", "", self.floor, self.clock.now), self._client_turn)
            return
        self._requests += 1
        request = f"r{self._requests}"
        key = f"k{self.chance.randrange(12)}"
        size = self.chance.choice([4, 40, 400])
        if roll < 0.85:
            command = encode_command(("put", request, key, request.ljust(size, ".")))
        elif roll < 0.98:
            request, command = "", encode_command(("bump", "", key, request))
        else:
            request, command = "", encode_command(("refuse", "", key, ""))
        kind = "refuse" if b"refuse" in command else "write"
        self._attempt(Call(kind, command, request, self.floor, self.clock.now), self._client_turn)

    def _attempt(self, call: Call, then: Callable[[], None]) -> None:
        awake = [process for process in self.processes.values() if process.up]
        if not awake:
            self.clock.later(0.2, lambda: self._attempt(call, then))
            return
        process = self.chance.choice(awake)
        core, runtime = process.core, process.runtime
        assert core is not None and runtime is not None
        call.process, call.core, call.ended = process, core, False
        call.attempts += 1
        call.due = float("inf")
        self.calls.append(call)
        call.then = then

        patience = self.chance.choice([0.8, 1.5, DEADLINE_SECONDS])

        def ask() -> None:
            call.due = self.clock.now + patience
            due = runtime.now() + patience
            if call.kind == "read":
                core.barrier(due, lambda confirmed: self._read(call, confirmed))
            else:
                core.submit(call.command, due, lambda end: self._written(call, end))

        process.deliver(ask)

    def _finish(self, call: Call, seconds: float) -> None:
        call.ended = True
        self.calls = [other for other in self.calls if other is not call]
        self.clock.later(seconds, call.then)

    def _retry_later(self, call: Call) -> None:
        """An outcome that is not known, or a definite no: with a request id the same may be asked again."""
        if call.request and call.attempts < 12:
            call.ended = True
            self.calls = [other for other in self.calls if other is not call]
            then = call.then
            self.clock.later(self.chance.uniform(0.01, 0.3), lambda: self._attempt(call, then))
        else:
            self._finish(call, self.chance.uniform(0.01, 0.3))

    def _read(self, call: Call, confirmed: bool) -> None:
        if call.ended:
            return
        process = call.process
        if confirmed and process is not None and process.replica is not None and process.core is call.core:
            revision = process.replica.state.revision
            self.result.reads += 1
            if revision < call.floor:
                self.violation(
                    "stale read", f"{process.node_id} showed revision {revision}, {call.floor} was known"
                )
            self.floor = max(self.floor, revision)
            self.log("read", process.node_id, revision)
        else:
            self.bites["read_refused"] += 1
        self._finish(call, self.chance.expovariate(1 / self.rig.think_seconds))

    def _written(self, call: Call, end: ProposalEnd) -> None:
        if call.ended:
            if call.core is not None and call.process is not None and call.core is call.process.core:
                self.violation("answered twice", repr(end))
            return
        if isinstance(end, Applied):
            self._acknowledged(call, end)
            self._finish(call, self.chance.expovariate(1 / self.rig.think_seconds))
        else:
            self.bites["rejected" if isinstance(end, Rejected) else "unknown"] += 1
            self._retry_later(call)
        if self.chance.random() < 0.02:
            self.bites["caller_gone"] += 1
            raise CallerGoneError

    def _acknowledged(self, call: Call, end: Applied) -> None:
        if call.kind == "refuse":
            return
        revision = end.result
        self.log("acknowledged", call.request, revision)
        self.result.acknowledged += 1
        if not isinstance(revision, int):
            self.violation("wrong answer", f"{call.request}: {end}")
        if revision <= call.floor:
            self.violation("order broken", f"revision {revision} given after {call.floor} was known")
        if self.contents.get(revision) != call.command:
            self.violation("another's answer", f"revision {revision} is not what was asked for")
        self.acknowledged[call.command] = revision
        self.floor = max(self.floor, revision)

    # -- the operator

    def wish(self, verb: str, node_id: str) -> None:
        self._wishes.append((verb, node_id))

    @property
    def wishes(self) -> int:
        return len(self._wishes)

    def new_node(self) -> str:
        self._node_count += 1
        return f"n{self._node_count}"

    def _operate(self) -> None:
        """One wish at a time, tried until it is granted; a node that will not start is replaced."""
        for process in list(self.processes.values()):
            if process.refused is not None and process.node_id not in self.lost_nodes:
                self.lost_nodes.add(process.node_id)
                self._wishes[:0] = [("remove", process.node_id), ("add", self.new_node())]
        if not self._wishes:
            damaged = self.processes.get(self.damaged_node)
            if not self.lost_nodes and (damaged is None or damaged.up):
                self.damaged_node = ""
            self.clock.later(0.3, self._operate)
            return
        verb, node_id = self._wishes[0]
        up = [process for process in self.processes.values() if process.awake]
        if not up:
            self.clock.later(0.3, self._operate)
            return
        process = self.chance.choice(up)
        core, runtime = process.core, process.runtime
        assert core is not None and runtime is not None
        argument = node_id.encode()
        if verb == "add":
            argument = msgspec.msgpack.encode(node_info(node_id))
            if node_id not in self.processes:
                self.processes[node_id] = Process(self, node_id, tuple(core.membership.current.voters))
                self.processes[node_id].start()
        answered = [False]

        def ended(outcome: str, message: str) -> None:
            if answered[0]:
                return
            answered[0] = True
            self.log("operator", verb, node_id, outcome)
            gone = verb == "remove" and (outcome == "done" or "There is no node" in message)
            hopeless = verb == "transfer" or "was removed" in message
            if outcome == "done" or gone or hopeless:
                self.bites[f"operator_{verb}"] += outcome == "done"
                if self._wishes and self._wishes[0] == (verb, node_id):
                    self._wishes.pop(0)
                if gone and node_id in self.lost_nodes:
                    self.lost_nodes.discard(node_id)
                    self.processes.pop(node_id, None)
            elif verb == "remove" and "cannot remove itself" in message:
                self._wishes.insert(0, ("transfer", ""))
            self.clock.later(self.chance.uniform(0.05, 0.5), self._operate)

        due = runtime.now() + DEADLINE_SECONDS
        process.deliver(lambda: core.control(verb, argument, due, ended))
        self.clock.later(DEADLINE_SECONDS + 2.0, lambda: ended("unknown", ""))

    # -- checks at every step

    def check(self, process: Process) -> None:
        core = process.core
        if core is None:
            return
        guard = core.guard
        if guard.leading:
            first = self.leaders.setdefault(guard.term, process.node_id)
            if first != process.node_id:
                self.violation(
                    "two leaders in one term", f"{first} and {process.node_id} in term {guard.term}"
                )
            if self.steady_term is not None and guard.term != self.steady_term:
                self.violation("a live leader was deposed", f"{process.node_id} leads term {guard.term}")
        commit = guard.commit_index
        if commit > process.checked_commit:
            log = guard.journal
            first_index = log[0][1]
            start = max(process.checked_commit + 1, first_index + 1)
            for command, index, term in log[start - first_index : commit + 1 - first_index]:
                content = (term, crc32(command))
                if self.entries.setdefault(index, content) != content:
                    self.violation(
                        "committed entry differs",
                        f"{process.node_id} at index {index}: {content}, {self.entries[index]}",
                    )
            process.checked_commit = commit
        if guard.leading:
            self._check_new_voters(process, core)
        if self.no_snapshot_needed and core.snapshotting.sent:
            self.violation("snapshot for a short absence", f"{process.node_id} sent one")

    def _check_new_voters(self, process: Process, core: RaftCore) -> None:
        """Whom a leader makes a voter has on its disk what was committed then, but for the lag that is allowed.

        Judged where the change is made, against the configuration before it in that same log: a change only another
        log held says nothing, nor does a configuration that came with a snapshot."""
        guard, index = core.guard, core.membership.current_index
        change = (guard.term, index)
        if (
            change <= process.checked_change
            or index <= guard.first_index
            or guard.term_at(index) != guard.term
        ):
            return
        process.checked_change = change
        committed = min(guard.commit_index, index)
        before = core.membership.at(index - 1).voter_ids()
        for node_id in sorted(core.membership.current.voter_ids() - before):
            new = self.processes.get(node_id)
            if (
                new is not None
                and not new.damaged
                and new.held_index + self.tuning["learner_lag_entries"] < committed
            ):
                self.violation(
                    "a voter counts before it has caught up",
                    f"{node_id} has {new.held_index} of {committed}, by {process.node_id} in term {guard.term}",
                )

    def check_callers(self) -> None:
        for call in self.calls:
            late = self.clock.now - call.due
            process = call.process
            if (
                late > 1.0
                and not call.ended
                and process is not None
                and process.awake
                and call.core is process.core
            ):
                self.violation(
                    "a caller is left waiting", f"{call.kind} at {process.node_id}, {late:.1f} s late"
                )

    # -- the end

    def leader(self) -> Process | None:
        leading = [
            (process.core.guard.term, process.node_id)
            for process in self.processes.values()
            if process.core is not None and process.awake and process.core.guard.leading
        ]
        return self.processes[max(leading)[1]] if leading else None

    def members(self) -> list[Process]:
        leader = self.leader()
        if leader is None or leader.core is None:
            return []
        return [
            self.processes[node.node_id]
            for node in leader.core.membership.current.voters
            if node.node_id in self.processes
        ]

    def agreed(self) -> bool:
        leader, members = self.leader(), self.members()
        if leader is None or leader.core is None or self._wishes or not leader.core.guard.acting:
            return False
        if leader.core.membership.current.learners:
            return False
        states = set()
        for process in members:
            if process.core is None or process.replica is None:
                return False
            if process.core.guard.leader_id != leader.node_id:
                return False
            states.add(
                (
                    process.core.guard.applied_index,
                    process.replica.state.revision,
                    process.replica.state.chain,
                )
            )
        here = {process.node_id for process in members}
        if any(process.up and process.node_id not in here for process in self.processes.values()):
            return False  # a removed node goes on as if it belonged
        return len(states) == 1 and not self.calls

    def check_end(self) -> None:
        leader = self.leader()
        if leader is None or leader.replica is None or not self.agreed():
            parts = []
            for process in self.processes.values():
                if process.core is not None:
                    guard = process.core.guard
                    parts.append(
                        f"{process.node_id}: state {guard.state} term {guard.term} leader {guard.leader_id} "
                        f"log {guard.first_index}..{guard.last_index} commit {guard.commit_index} "
                        f"applied {guard.applied_index} voter {guard.is_voter} full {guard.disk_full}"
                    )
                else:
                    parts.append(f"{process.node_id}: down {process.refused or process.ended or ''}")
            calls = [
                (call.kind, call.process.node_id if call.process else "", call.attempts)
                for call in self.calls
            ]
            self.violation(
                "no agreement after the faults ended",
                "; ".join(parts) + f" wishes {self._wishes} calls {calls}",
            )
            return
        state = leader.replica.state
        for command, revision in self.acknowledged.items():
            if revision > state.revision or self.contents.get(revision) != command:
                self.violation("an acknowledged write is lost", f"revision {revision} of {state.revision}")

    def finish(self) -> Result:
        self.result.virtual_seconds = self.clock.now
        self.result.terms = len(self.leaders)
        self._trace.update(repr((self.clock.steps, sorted(self.acknowledged.items()))).encode())
        self.result.digest = self._trace.hexdigest()
        return self.result
