"""One node under a simulated clock and disk, with a network that only takes notes: to say to it what one likes."""

import random
from collections import Counter
from typing import Any

from chaos_tests.simulation.clock import Clock, ProcessRuntime
from chaos_tests.simulation.disk import SimulatedDisk, SimulatedSyncer
from chaos_tests.simulation.replica import SimulatedReplica, encode_command
from cluster.consensus import NodeInfo, ProposalEnd
from cluster.raft.core import LinkEvents, RaftCore
from cluster.raft.entries import encode_groups
from cluster.raft.messages import (
    Ack,
    AppendEntries,
    Entry,
    Message,
    PreVote,
    RequestPreVote,
    RequestVote,
    Vote,
)
from cluster.raft.settings import RaftSettings


def info(number: int) -> NodeInfo:
    return NodeInfo(f"n{number}", f"n{number}:1", f"http://n{number}", f"key{number}")


def entry(index: int, term: int, value: str = "v") -> Entry:
    command = encode_command(("put", f"r{index}.{term}", "k", value))
    return encode_groups([(7, index, [command])]), index, term


class LoneNode:
    def __init__(self, size: int = 3, **tuning: Any) -> None:
        self.clock = Clock()
        self.disk = SimulatedDisk(random.Random(1), Counter())
        self.size = size
        self.tuning = tuning
        self.applied: list[int] = []
        self.sent: list[tuple[str, Message]] = []
        self.links: list[tuple[str, str]] = []
        self.started = False
        self.fatal: list[str] = []
        self.start()

    def start(self) -> None:
        founders = tuple(info(number) for number in range(1, self.size + 1))
        self.syncer = SimulatedSyncer(self.clock, random.Random(2), lambda: None)
        self.runtime = ProcessRuntime(self.clock, random.Random(3), self.syncer)
        self.syncer.deliver = self.runtime.call_soon
        self.replica = SimulatedReplica(lambda revision, *_: self.applied.append(revision), lambda _: None)
        self.core = RaftCore(
            RaftSettings(
                node=info(1), cluster_id="c", founders=founders, may_create=not self.started, **self.tuning
            ),
            self.disk,
            self.runtime,
            self._links,
            self.replica,
        )
        self.started = True
        self.core.on_fatal(self.fatal.append)
        self.core.begin()
        for number in range(2, self.size + 1):
            self.core.on_connected(f"n{number}")

    def _links(self, events: LinkEvents) -> "LoneNode":
        return self

    def send(self, node_id: str, message: Message) -> bool:
        self.sent.append((node_id, message))
        return True

    def dial(self, node: NodeInfo) -> None:
        self.links.append(("dial", node.node_id))

    def hang_up(self, node_id: str) -> None:
        self.links.append(("hang_up", node_id))

    def power_cycle(self) -> None:
        self.runtime.alive = self.syncer.alive = False
        self.disk.power_lost()
        self.start()

    def pass_seconds(self, seconds: float = 0.1) -> None:
        self.clock.run_until(self.clock.now + seconds)

    def hear(self, node_id: str, message: Message) -> None:
        self.core.on_message(node_id, message)

    def append(
        self, entries: list[Entry], *, term: int = 1, previous: tuple[int, int] = (1, 0), commit: int = 1,
        sender: str = "n2",
    ) -> None:  # fmt: skip
        self.hear(sender, AppendEntries(term, commit, previous[0], previous[1], entries, 5.0, 0.0))

    def of(self, kind: type) -> list[Any]:
        return [message for _, message in self.sent if isinstance(message, kind)]

    def lead(self) -> int:
        """Win an election among however many; returns the term."""
        for _ in range(200):
            self.pass_seconds(0.05)
            for node_id, message in list(self.sent):
                if isinstance(message, RequestPreVote):
                    self.hear(node_id, PreVote(message.term - 1, message.round, True))
                elif isinstance(message, RequestVote):
                    self.hear(node_id, Vote(message.term))
            self.sent = [item for item in self.sent if isinstance(item[1], AppendEntries)]
            if self.core.guard.leading:
                self.pass_seconds(0.05)
                return self.core.guard.term
        raise AssertionError("no majority voted")

    def acknowledge(self, node_id: str, index: int, term: int | None = None) -> None:
        term = self.core.guard.term if term is None else term
        self.hear(node_id, Ack(term, index + 1, True, False, self.runtime.now()))

    def propose(self, command: bytes, seconds: float = 2.0) -> list[ProposalEnd]:
        ends: list[ProposalEnd] = []
        self.core.submit(command, self.runtime.now() + seconds, ends.append)
        return ends
