"""What a run is built with: all corrections, or all but one.

Owned here: the corrections that live outside the guard (in the application, in the journal), how each is taken away,
and the list of all that can be. Only the simulation can take one away. Findings 7, 17 and 18 are not among them: they
are about sockets and encodings, which the simulation replaces; `tests/cluster/raft/` shows those on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cluster.consensus import ConsensusStartError
from cluster.raft.corrections import ALL, Corrections
from cluster.raft.disk import Disk
from cluster.raft.journal import Journal


class _ClearsThenAdds(Journal):
    """3: compaction as the engine's journal does it, clear and add again: a process that ends in between finds a part
    of what it had."""

    def compact_to(self, index: int, keep_tail_bytes: int = 0) -> None:
        super().compact_to(index, keep_tail_bytes)
        _half_compacted.add(self._disk)
        self.setCurrentTerm(self.getCurrentTerm(), self.getVotedForNodeId())
        self.flush()
        self.when_synced(self.written, lambda: _half_compacted.discard(self._disk))


_half_compacted: set[object] = set()


def _clears_then_adds(disk: Disk, *arguments: Any, **options: Any) -> Journal:
    journal = _ClearsThenAdds.open(disk, *arguments, **options)
    if disk in _half_compacted:
        _half_compacted.discard(disk)
        journal.deleteEntriesFrom(max(1, len(journal) // 2))
    return journal


def _forgets_its_vote(*arguments: Any, **options: Any) -> Journal:
    """11: term and vote are not found again."""
    journal = Journal.open(*arguments, **options)
    journal._term, journal._voted_for = (journal[-1][2] if len(journal) else 0), None
    return journal


def _fears_a_torn_tail(*arguments: Any, **options: Any) -> Journal:
    """10: the start fails where a write was cut short."""
    journal = Journal.open(*arguments, **options)
    if journal.dropped_bytes:
        raise ConsensusStartError("the journal's tail is torn")
    return journal


@dataclass(frozen=True, slots=True)
class Rig:
    corrections: Corrections = ALL
    open_journal: Callable[..., Journal] = Journal.open
    remembers_requests: bool = True  # 14
    refuses_by_value: bool = True  # 12
    think_seconds: float = 0.03


_NUMBERS: Mapping[str, str] = {
    "snapshot_never_commits": "1",
    "keep_suffix_after_snapshot": "2",
    "wait_for_sync": "4",
    "truncate_only_conflicts": "5",
    "compact_behind_snapshot_only": "6",
    "acks_carry_term": "8",
    "corrupt_snapshot_stops": "9",
    "read_barrier": "13",
    "deadlines": "15",
    "stable_repair_hint": "16",
    "disk_full_survived": "19",
    "pre_vote": "20",
    "apply_before_answer": "21",
    "one_change_at_a_time": "22",
    "membership_from_log": "22",
    "learner_first": "22",
    "removed_is_told": "22",
    "keep_tail": "23",
}
WITHOUT: dict[str, Rig] = {
    f"{_NUMBERS[item.name]}-{item.name}": Rig(corrections=replace(ALL, **{item.name: False}))
    for item in fields(Corrections)
}
WITHOUT |= {
    "3-compaction_is_one_step": Rig(open_journal=_clears_then_adds),
    "10-torn_tail_is_dropped": Rig(open_journal=_fears_a_torn_tail),
    "11-vote_is_kept": Rig(open_journal=_forgets_its_vote),
    "12-refusals_are_values": Rig(refuses_by_value=False),
    "14-requests_are_remembered": Rig(remembers_requests=False),
}
