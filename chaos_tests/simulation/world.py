"""A whole cluster in one process and in virtual time: the real node code over simulated clock, network and disks.

Owned here: when processes live and die, the operator, and what is checked at every step and at the end. One node is
`process.py`'s, what clients ask and are told `clients.py`'s; which faults come when is `weather.py`'s; running many worlds
is `run.py`'s.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import msgspec

from chaos_tests.simulation.clients import DEADLINE_SECONDS, Clients
from chaos_tests.simulation.clock import Clock
from chaos_tests.simulation.network import Network
from chaos_tests.simulation.process import Process, ViolationError
from chaos_tests.simulation.replica import SimulatedReplica
from chaos_tests.simulation.rig import Rig
from cluster.consensus import NodeInfo
from cluster.raft.core import RaftCore
from cluster.raft.messages import Message
from cluster.raft.settings import RaftSettings

CLUSTER = "simulated"


def node_info(node_id: str) -> NodeInfo:
    return NodeInfo(node_id, f"{node_id}:7100", f"http://{node_id}:7000", f"key-of-{node_id}")


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
        self.network.flooded = lambda sender, receiver: self.violation(
            "a node sends without end", f"{sender} to {receiver}"
        )
        self.network.watch = self._watch
        self.tuning = tuning
        self.processes: dict[str, Process] = {}
        self.leaders: dict[int, str] = {}
        self.entries: dict[int, tuple[int, int]] = {}
        self.chains: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}
        self.clients = Clients(self)
        self.faults_over = False
        self.steady_term: int | None = None  # while set, leadership must not change
        self.no_snapshot_needed = False
        self.watching: dict[
            str, Callable[[str, str, Message], None]
        ] = {}  # by the fault that waits for a message
        self._trace = hashlib.blake2b(digest_size=16)
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
        self.clock.later(1.0, self._look_after)
        self.clients.begin()

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
        for arrived in list(self.watching.values()):
            arrived(sender, receiver, message)

    def violation(self, kind: str, detail: str) -> None:
        self.result.violations.append(f"{kind} at {self.clock.now:.3f} s: {detail}")
        self.log("violation", kind)
        raise ViolationError(kind)

    # -- lives

    def kill(self, process: Process) -> None:
        if process.up:
            self.log("kill", process.node_id)
            self.bites["killed"] += 1
            self.clients.forget(process)
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
        self.clients.forget(process)
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

    def _look_after(self) -> None:
        """Who knows no member of today, because all it knew were removed while it was away, lets none of them in: it
        can neither be told nor catch up, and an operator must see to it, as `docs/operating/trackers.md` says."""
        self.clock.later(1.0, self._look_after)
        leader = self.leader()
        if leader is None or leader.core is None or not leader.core.guard.acting:
            return
        current = leader.core.membership.current
        members = {node.node_id for node in (*current.voters, *current.learners)}
        for process in list(self.processes.values()):
            if not process.awake or any(process.knows(one) for one in members if one != process.node_id):
                process.estranged_seconds = 0
                continue
            process.estranged_seconds += 1
            if process.estranged_seconds < 5:
                continue
            self.log("estranged", process.node_id)
            self.bites["estranged"] += 1
            self.kill(process)
            if process.node_id in current.voter_ids():
                process.refused = "it knows no member of today"  # removed, and another one added
            else:
                del self.processes[process.node_id]  # invited anew, if it is still to come in

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
        if core.snapshotting.resumed > process.checked_resumed:
            process.checked_resumed = core.snapshotting.resumed
            self.bites["snapshot_resumed"] += 1
        if len(process.disk.parts()) > 2:
            self.violation("parts of snapshots gather", f"{process.node_id}: {process.disk.parts()}")
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
            if process.core.guard.leader_id != leader.node_id or process.disk.parts():
                return False
            states.add(
                (
                    process.core.guard.applied_index,
                    process.replica.state.revision,
                    process.replica.digest(),
                )
            )
        here = {process.node_id for process in members}
        if any(process.up and process.node_id not in here for process in self.processes.values()):
            return False  # a removed node goes on as if it belonged
        return len(states) == 1 and not self.clients.calls

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
                        f"applied {guard.applied_index} voter {guard.is_voter} full {guard.disk_full} "
                        f"parts {process.disk.parts()}"
                    )
                else:
                    parts.append(f"{process.node_id}: down {process.refused or process.ended or ''}")
            calls = [
                (call.kind, call.process.node_id if call.process else "", call.attempts)
                for call in self.clients.calls
            ]
            self.violation(
                "no agreement after the faults ended",
                "; ".join(parts) + f" wishes {self._wishes} calls {calls}",
            )
            return
        state = leader.replica.state
        for command, revision in self.clients.acknowledged.items():
            if revision > state.revision or self.contents.get(revision) != command:
                self.violation("an acknowledged write is lost", f"revision {revision} of {state.revision}")

    def finish(self) -> Result:
        self.result.virtual_seconds = self.clock.now
        self.result.terms = len(self.leaders)
        self._trace.update(repr((self.clock.steps, sorted(self.clients.acknowledged.items()))).encode())
        self.result.digest = self._trace.hexdigest()
        return self.result
