"""Which of PySyncObj's faults (docs: `raft.md`, by number) are put right: all of them, always.

The switches exist so that the simulation can take one correction away and show that the fault comes back.
Nothing a user can configure reaches them: `open_node` does not take them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    snapshot_never_commits: bool = True  # 1
    keep_suffix_after_snapshot: bool = True  # 2
    wait_for_sync: bool = True  # 4
    truncate_only_conflicts: bool = True  # 5
    compact_behind_snapshot_only: bool = True  # 6
    acks_carry_term: bool = True  # 8
    corrupt_snapshot_stops: bool = True  # 9
    read_barrier: bool = True  # 13
    deadlines: bool = True  # 15
    stable_repair_hint: bool = True  # 16
    disk_full_survived: bool = True  # 19
    pre_vote: bool = True  # 20
    apply_before_answer: bool = True  # 21
    one_change_at_a_time: bool = True  # 22
    membership_from_log: bool = True  # 22
    learner_first: bool = True  # 22
    removed_is_told: bool = True  # 22
    keep_tail: bool = True  # 23


ALL = Corrections()
