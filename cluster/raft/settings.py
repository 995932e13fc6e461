"""What a Raft node is told before it starts: who it is, and its times and sizes.

The times hang together: a leader cut off steps down (`leader_fallback_seconds`) no later than others may need to
find a new one, and never later than 1.5 s; a heartbeat is well under the shortest election time.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.consensus import NodeInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftSettings:
    node: NodeInfo
    cluster_id: str
    founders: tuple[NodeInfo, ...]
    """The members as known when the folder is first written. A founder is among them; a node that is to be
    added is not, and waits for a leader."""
    may_create: bool = True
    """Whether an empty folder may be begun with. False once the node has ever run: a node that lost its
    folder does not know how it voted, and must be removed and added as a new one."""

    election_seconds_min: float = 0.6
    election_seconds_max: float = 1.2
    heartbeat_seconds: float = 0.1
    leader_fallback_seconds: float = 1.2
    tick_seconds: float = 0.025
    transfer_seconds_max: float = 1.5
    lost_leader_seconds_max: float = 0.15
    """After the leader's connection broke, a pre-vote is tried within this time. It can only succeed if a
    majority has no connection to that leader either."""

    batch_bytes: int = 1 << 20
    batch_commands: int = 1024
    command_bytes_max: int = 2 << 20
    queue_bytes_max: int = 64 << 20
    queue_commands_max: int = 100_000
    append_bytes: int = 1 << 20
    append_entries: int = 256
    unacknowledged_entries_max: int = 1024
    forwards_in_flight: int = 4

    log_bytes_before_snapshot: int = 64 << 20
    keep_tail_bytes: int = 16 << 20
    segment_bytes: int = 16 << 20
    snapshot_chunk_bytes: int = 256 << 10
    snapshot_chunks_in_flight: int = 4
    snapshot_slice_seconds: float = 0.004
    apply_slice_seconds: float = 0.008

    learner_lag_entries: int = 64

    def __post_init__(self) -> None:
        if not self.heartbeat_seconds * 3 < self.election_seconds_min < self.election_seconds_max:
            raise ValueError(
                "heartbeat_seconds, election_seconds_min and _max must rise, the first by three times"
            )
        if not self.heartbeat_seconds < self.leader_fallback_seconds <= 1.5:
            raise ValueError("leader_fallback_seconds must lie between heartbeat_seconds and 1.5")
