"""The network between simulated processes: connections that break, links that stall, delay and lose.

Owned here: one connection for each pair of nodes, FIFO while it lives, as TCP is. A cut loses what is under way, or
delivers some of it late, after a new connection was made: what an old connection still had in a buffer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec

from chaos_tests.simulation.clock import Clock
from cluster.consensus import NodeInfo
from cluster.raft.messages import Message

UNDER_WAY_MAX = 50_000  # more on one connection is no burst but a loop that does not end

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class Endpoint(Protocol):
    """A process, as the network sees it."""

    node_id: str

    def wants(self, node_id: str) -> bool: ...

    def knows(self, node_id: str) -> bool: ...

    def deliver(self, call: Callable[[], None]) -> None: ...

    def connected(self, node_id: str) -> None: ...

    def disconnected(self, node_id: str) -> None: ...

    def message(self, node_id: str, message: Message) -> None: ...


class _Connection:
    def __init__(self) -> None:
        self.alive = True
        self.last: dict[str, float] = {}  # by sender: when its latest message arrives
        self.under_way: dict[int, tuple[str, str, bytes]] = {}
        self.stalled: list[tuple[str, str, bytes]] = []


class Network:
    def __init__(self, clock: Clock, chance: random.Random, bites: Counter[str]) -> None:
        self._clock = clock
        self._chance = chance
        self._bites = bites
        self.endpoints: dict[str, Endpoint] = {}
        self._connections: dict[tuple[str, str], _Connection] = {}
        self.cut: set[tuple[str, str]] = set()  # directed: nothing passes
        self.delay: dict[tuple[str, str], float] = {}
        self.loss = 0.0
        self.flooded: Callable[[str, str], None] = lambda sender, receiver: None  # must raise
        self.watch: Callable[[str, str, bytes, Message], None] = lambda sender, receiver, data, message: None
        self._count = 0

    def start(self, endpoint: Endpoint) -> None:
        self.endpoints[endpoint.node_id] = endpoint
        self.look()

    def stop(self, node_id: str) -> None:
        self.endpoints.pop(node_id, None)
        for pair in sorted(self._connections):
            if node_id in pair:
                self._break(pair, "peer_gone")

    def look(self) -> None:
        """Make the connections that are wanted and possible, each after a moment."""
        nodes = sorted(self.endpoints)
        for place, a in enumerate(nodes):
            for b in nodes[place + 1 :]:
                if (a, b) not in self._connections and self._possible(a, b):
                    self._clock.later(
                        self._chance.uniform(0.01, 0.1), lambda pair=(a, b): self._connect(pair)
                    )  # type: ignore[misc]

    def _possible(self, a: str, b: str) -> bool:
        if a not in self.endpoints or b not in self.endpoints or (a, b) in self.cut or (b, a) in self.cut:
            return False
        one, other = self.endpoints[a], self.endpoints[b]
        return (one.wants(b) and (other.knows(a) or other.wants(a))) or (
            other.wants(a) and (one.knows(b) or one.wants(b))
        )

    def _connect(self, pair: tuple[str, str]) -> None:
        a, b = pair
        if pair in self._connections or not self._possible(a, b):
            return
        self._connections[pair] = _Connection()
        for one, other in ((a, b), (b, a)):
            endpoint = self.endpoints[one]
            endpoint.deliver(lambda endpoint=endpoint, other=other: endpoint.connected(other))  # type: ignore[misc]

    def _break(self, pair: tuple[str, str], why: str) -> None:
        connection = self._connections.pop(pair, None)
        if connection is None:
            return
        connection.alive = False
        self._bites[f"connection_{why}"] += 1
        lost = [connection.under_way[number] for number in sorted(connection.under_way)] + connection.stalled
        for sender, receiver, data in lost:
            if why != "peer_gone" and self._chance.random() < 0.3:
                # Read from the old connection's buffer after the new one has begun.
                self._bites["message_after_reconnect"] += 1
                self._clock.later(
                    self._chance.uniform(0.0, 0.6),
                    lambda sender=sender, receiver=receiver, data=data: self._hand_over(
                        sender, receiver, data
                    ),  # type: ignore[misc]
                )
            else:
                self._bites["message_lost"] += 1
        for one, other in (pair, pair[::-1]):
            endpoint = self.endpoints.get(one)
            if endpoint is not None:
                notice = self._chance.choice([0.0, 0.01, 0.3])
                self._clock.later(
                    notice,
                    lambda endpoint=endpoint, other=other: endpoint.deliver(  # type: ignore[misc]
                        lambda: self._notice(endpoint, other)
                    ),
                )
        self._clock.later(self._chance.uniform(0.05, 0.3), self.look)

    def _notice(self, endpoint: Endpoint, other: str) -> None:
        pair = (min(endpoint.node_id, other), max(endpoint.node_id, other))
        if self.endpoints.get(endpoint.node_id) is endpoint and pair not in self._connections:
            endpoint.disconnected(other)

    def hang_up(self, a: str, b: str) -> None:
        self._clock.later(0.0, lambda: self._break((min(a, b), max(a, b)), "hung_up"))

    def reset(self, a: str, b: str) -> None:
        self._break((min(a, b), max(a, b)), "reset")

    def send(self, sender: str, receiver: str, message: Message) -> bool:
        connection = self._connections.get((min(sender, receiver), max(sender, receiver)))
        if connection is None or sender not in self.endpoints:
            return False
        data = _encode(message)
        self._transmit(connection, sender, receiver, data)
        return True

    def _transmit(self, connection: _Connection, sender: str, receiver: str, data: bytes) -> None:
        if (sender, receiver) in self.cut:
            self._bites["message_stalled"] += 1
            connection.stalled.append((sender, receiver, data))
            return
        if self.loss and self._chance.random() < self.loss:
            # TCP sends it again: it, and all behind it, come later.
            connection.last[sender] = max(connection.last.get(sender, 0.0), self._clock.now) + 0.2
            self._bites["message_retransmitted"] += 1
        if len(connection.under_way) >= UNDER_WAY_MAX:
            self.flooded(sender, receiver)
        delay = self.delay.get((sender, receiver), 0.0) + self._chance.uniform(0.0002, 0.004)
        arrival = max(self._clock.now + delay, connection.last.get(sender, 0.0))
        connection.last[sender] = arrival
        self._count += 1
        number = self._count
        connection.under_way[number] = (sender, receiver, data)

        def arrive() -> None:
            if connection.alive and connection.under_way.pop(number, None) is not None:
                if (sender, receiver) in self.cut:
                    connection.stalled.append((sender, receiver, data))
                    self._bites["message_stalled"] += 1
                else:
                    self._hand_over(sender, receiver, data)

        self._clock.at(arrival, arrive)

    def _hand_over(self, sender: str, receiver: str, data: bytes) -> None:
        endpoint = self.endpoints.get(receiver)
        if endpoint is not None and sender in self.endpoints:
            message = _decode(data)
            self.watch(sender, receiver, data, message)
            endpoint.deliver(lambda: endpoint.message(sender, message))

    # -- faults

    def cut_both(self, a: str, b: str) -> None:
        self.cut |= {(a, b), (b, a)}
        self._break((min(a, b), max(a, b)), "cut")

    def cut_one_way(self, a: str, b: str) -> None:
        """Nothing from `a` reaches `b`; the connection stands, as TCP's does for a while."""
        self.cut.add((a, b))

    def heal(self) -> None:
        healed, self.cut = sorted(self.cut), set()
        self.delay.clear()
        self.loss = 0.0
        for a, b in healed:
            pair = (min(a, b), max(a, b))
            connection = self._connections.get(pair)
            if connection is None:
                continue
            if self._chance.random() < 0.5:
                self._break(pair, "reset")
            else:
                stalled, connection.stalled = connection.stalled, []
                self._bites["message_late"] += len(stalled)
                for sender, receiver, data in stalled:
                    self._transmit(connection, sender, receiver, data)
        self.look()


class SimulatedLinks:
    """`Links` of one process."""

    def __init__(self, network: Network, node_id: str) -> None:
        self._network = network
        self._node_id = node_id
        self.wanted: set[str] = set()

    def send(self, node_id: str, message: Message) -> bool:
        return self._network.send(self._node_id, node_id, message)

    def dial(self, node: NodeInfo) -> None:
        self.wanted.add(node.node_id)
        self._network.look()

    def hang_up(self, node_id: str) -> None:
        self.wanted.discard(node_id)
        self._network.hang_up(self._node_id, node_id)
