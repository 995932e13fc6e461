"""What the service needs of Raft, and nothing more.

Owned here: the vocabulary of a proposal's end, the status of a node, and the protocol that
`cluster.raft.node.RaftNode` fulfils (and, for tests, an in-memory stand-in that passes the same
contract tests). Left to others: how agreement is reached (`cluster/raft/`), what a command means
(`state_machine/`).

The contract of `propose`: every proposal ends in exactly one of

* `Applied`  it is committed, synced on a majority and applied on this node; `result` is what the
  state machine answered (which may itself be a refusal: that is a value, not a failure),
* `Rejected` it certainly never took effect and never will (definite),
* `Unknown`  it may or may not take effect (indefinite); the request id makes a retry safe,

before its deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Refusal(StrEnum):
    """Why a proposal certainly did not happen."""

    NO_LEADER = "no_leader"
    DISK_FULL = "disk_full"
    OVERLOADED = "overloaded"
    STOPPING = "stopping"
    TOO_LARGE = "too_large"
    NOT_A_MEMBER = "not_a_member"


@dataclass(frozen=True, slots=True)
class Applied:
    index: int
    term: int
    result: Any


@dataclass(frozen=True, slots=True)
class Rejected:
    refusal: Refusal
    message: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """The deadline passed, or the leader changed, after the proposal had left."""

    message: str


ProposalEnd = Applied | Rejected | Unknown


class BarrierError(Exception):
    """A linearizable read could not be confirmed in time. Reading is free of effect: retry."""


class MembershipError(Exception):
    """A membership change was refused; the message says why. Nothing happened."""


class MembershipUnknownError(MembershipError):
    """A membership change may or may not have happened; look at the status."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node as the membership knows it. Travels in configuration entries and snapshots."""

    node_id: str
    raft: str  # host:port other nodes dial
    http: str  # whole URL users dial
    key_fingerprint: str  # hex SHA-256 of the node certificate's SubjectPublicKeyInfo; "" when insecure


class Role(StrEnum):
    LEADER = "leader"
    FOLLOWER = "follower"
    CANDIDATE = "candidate"
    LEARNER = "learner"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    info: NodeInfo
    role: Role
    reachable: bool  # as seen from the answering node
    applied: int  # Raft index; 0 when not known here
    committed: int


@dataclass(frozen=True, slots=True)
class ConsensusStatus:
    node_id: str
    role: Role
    term: int
    leader: str | None
    quorum: bool  # this node heard from a majority (leader) or from such a leader, lately
    committed: int
    applied: int
    disk_full: bool = False
    nodes: Sequence[NodeStatus] = field(default_factory=tuple)


class FrozenState(Protocol):
    """A state frozen at an index, encodable while the live state goes on changing."""

    def slices(self) -> Iterator[bytes]:
        """Yield the encoding piece by piece; each step takes a few milliseconds at most."""


class StateLoader(Protocol):
    """The reverse of `FrozenState.slices`: fed the same bytes, cut anywhere."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises `ValueError` for bytes that are not an encoding."""

    def work(self) -> bool:
        """Do a few milliseconds of decoding; False when there is nothing left to do for now."""

    def finish(self) -> None:
        """Swap the loaded state in, at once. Raises `ValueError` if it is not whole."""


class Replica(Protocol):
    """The replicated application as Raft sees it. Pure; never raises for any bytes it is given."""

    def apply(self, commands: Sequence[bytes]) -> list[Any]:
        """Apply the commands of one entry in order; one result for each, refusals being values."""

    def freeze(self) -> FrozenState:
        """Freeze the state in (near) constant time."""

    def loader(self) -> StateLoader: ...

    def digest(self) -> bytes:
        """A digest of the whole state; equal states have equal digests. Slow; for tests."""


class Consensus(Protocol):
    """One node's end of the replicated log. All methods belong to the event loop's thread."""

    @property
    def node_id(self) -> str: ...

    async def start(self) -> None:
        """Recover from disk and take part. Raises a `ConsensusStartError` saying what is wrong."""

    async def stop(self) -> None:
        """Hand leadership over if it is ours, answer everyone who waits, sync, close."""

    async def propose(self, command: bytes, *, deadline_seconds: float) -> ProposalEnd: ...

    async def read_barrier(self, *, deadline_seconds: float) -> None:
        """Return once everything acknowledged before the call is applied here; else BarrierError."""

    def status(self) -> ConsensusStatus: ...

    def quorum_age_seconds(self) -> float:
        """Seconds since this node knew (itself, or from its leader) that a quorum is in touch;
        `inf` when never."""

    def is_leader(self) -> bool:
        """Leader with its own no-op applied: may act for the cluster (leases, key rotation)."""

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        """Call with True on becoming an acting leader, with False on ceasing to be one."""

    def on_fatal(self, callback: Callable[[str], None]) -> None:
        """Called once when the node must end (failed sync, impossible state), with the reason."""

    async def add_node(self, node: NodeInfo, *, deadline_seconds: float) -> None:
        """Add as learner, let it catch up, then let it count. One change at a time. On a follower,
        the request is forwarded to the leader. Raises `MembershipError`."""

    async def remove_node(self, node_id: str, *, deadline_seconds: float) -> None: ...

    async def transfer_leadership(self, node_id: str | None, *, deadline_seconds: float) -> str:
        """Hand over to `node_id` (None: the one best caught up); returns the new leader's id."""


class ConsensusStartError(Exception):
    """The node must not start: what, where, and what the operator can do. Shown to people."""
