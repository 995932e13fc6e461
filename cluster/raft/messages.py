"""What nodes say to each other, as types: one tagged union, nothing executable in it.

Owned here: the shapes and their order in the union (the tags are a wire contract; new kinds get new tags).
Left to others: bytes and bounds (`frames.py`), sockets (`transport.py`), meaning (`guard.py` and its neighbours).

Times named `sent_at` are the sender's own monotonic seconds; the receiver only echoes them, so that the
leader can tell which of its messages an answer belongs to (Raft thesis 6.2, 6.4) without trusting any clock but its own.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

Entry: TypeAlias = tuple[bytes, int, int]
"""(command, index, term), as PySyncObj's journal keeps them."""


class AppendEntries(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    term: int
    commit_index: int
    previous_index: int
    previous_term: int
    entries: list[Entry]
    sent_at: float
    quorum_age_seconds: (
        float  # how long ago the leader knew a majority in touch; negative: never in this term
    )


class Ack(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Answer to `AppendEntries`. `success`: everything before `next_index` is on this node's disk and equal to
    the leader's. `reset`: the entries did not fit; send again from `next_index`. Neither: alive."""

    term: int
    next_index: int
    success: bool
    reset: bool
    sent_at: float
    disk_full: bool = False
    applied_index: int = 0


class RequestVote(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    term: int
    last_log_index: int
    last_log_term: int


class Vote(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """Sent only when granted (as PySyncObj does), and only once it is on disk."""

    term: int


class RequestPreVote(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """Raft thesis 9.6: would you vote for me in `term`? Changes nothing on either side."""

    term: int
    last_log_index: int
    last_log_term: int
    round: int


class PreVote(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    term: int  # the answering node's current term
    round: int
    granted: bool


class TimeoutNow(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Leadership transfer (Raft thesis 3.10): start an election at once."""

    term: int


class Probe(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """Read barrier: am I still leader of `term`? Answered without touching the disk."""

    term: int
    round: int
    sent_at: float


class ProbeAck(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    term: int
    round: int
    sent_at: float


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    term: int
    index: int  # of the last entry the snapshot holds
    index_term: int
    config: bytes
    size_bytes: int
    digest: bytes
    offset: int
    data: bytes
    commit_index: int
    sent_at: float


class SnapshotAck(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=11):
    """`offset`: the next byte wanted; equal to the snapshot's size once all of it is safe and loaded."""

    term: int
    index: int
    offset: int
    installed: bool
    sent_at: float


class Forward(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=12):
    """A follower's batch for the leader of `term`, and for no other: so a later term in the log proves the end of it."""

    term: int
    origin: int
    sequence: int
    commands: list[bytes]


class ForwardRefused(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=13):
    """Definite: nothing of that batch went into the log."""

    origin: int
    sequence: int
    refusal: str
    message: str


class ReadIndex(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=14):
    term: int
    request: int


class ReadIndexAck(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=15):
    request: int
    index: int
    ok: bool


class ControlRequest(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=16):
    """A follower hands the leader an operator's wish: `add`, `remove` or `transfer`."""

    request: int
    verb: str
    argument: bytes
    deadline_seconds: float


class ControlAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=17):
    """`outcome`: `done`, `refused` or `unknown`."""

    request: int
    outcome: str
    message: str


class Removed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=18):
    """You are no longer of this cluster, by the configuration entry at `index`."""

    index: int


class Introduction(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=19):
    """The members as the sender knows them, said once per connection. A node that was away learns from it whom to
    let in; votes and commits know nothing of it."""

    index: int
    configuration: bytes


Message: TypeAlias = (
    AppendEntries
    | Ack
    | RequestVote
    | Vote
    | RequestPreVote
    | PreVote
    | TimeoutNow
    | Probe
    | ProbeAck
    | SnapshotChunk
    | SnapshotAck
    | Forward
    | ForwardRefused
    | ReadIndex
    | ReadIndexAck
    | ControlRequest
    | ControlAnswer
    | Removed
    | Introduction
)
