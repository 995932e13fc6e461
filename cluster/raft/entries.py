"""The bytes of a log entry: a kind, then msgpack that can hold data and nothing else.

Owned here: the entry's kinds, the batch of commands, the configuration. PySyncObj pickles all three
(`raft.md`, 7) and stores method numbers that shift (18); it is never given an entry to decode here.
The first byte is PySyncObj's own command type, so that its no-op stays its no-op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from cluster.consensus import NodeInfo

COMMANDS = b"\x00"
NO_OP = b"\x01"
CONFIGURATION = b"\x02"

Group: TypeAlias = tuple[int, int, list[bytes]]
"""(origin, sequence, commands): a batch as its node gathered it. `origin` names that node's process, not the
node: a restarted process must not take an old batch's results for its own."""


class Configuration(msgspec.Struct, frozen=True, array_like=True):
    """Who the cluster is. In force from the moment it is in the log (Raft thesis 4.1)."""

    voters: tuple[NodeInfo, ...]
    learners: tuple[NodeInfo, ...] = ()
    removed: tuple[NodeInfo, ...] = ()  # kept so that they can be told when they come back

    def voter_ids(self) -> frozenset[str]:
        return frozenset(node.node_id for node in self.voters)

    def find(self, node_id: str) -> NodeInfo | None:
        for node in (*self.voters, *self.learners):
            if node.node_id == node_id:
                return node
        return None

    def is_removed(self, node_id: str) -> bool:
        return any(node.node_id == node_id for node in self.removed)


REMOVED_KEPT = 64


_encoder = msgspec.msgpack.Encoder()
_groups = msgspec.msgpack.Decoder(list[Group])
_configuration = msgspec.msgpack.Decoder(Configuration)


def encode_groups(groups: Sequence[Group]) -> bytes:
    return COMMANDS + _encoder.encode(groups)


def decode_groups(entry: bytes) -> list[Group]:
    """Raises `msgspec.DecodeError` for bytes that are no batch: the log then holds what nobody wrote."""
    return _groups.decode(memoryview(entry)[1:])


def encode_configuration(configuration: Configuration) -> bytes:
    return CONFIGURATION + _encoder.encode(configuration)


def decode_configuration(entry: bytes) -> Configuration:
    return _configuration.decode(memoryview(entry)[1:])
