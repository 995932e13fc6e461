"""What a run is built with: all corrections, or all but one.

Owned here: the corrections that live outside the guard (in the application, in the journal) and how each is taken
away. Only the simulation can do that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.raft.corrections import ALL, Corrections
from cluster.raft.journal import Journal


@dataclass(frozen=True, slots=True)
class Rig:
    corrections: Corrections = ALL
    open_journal: Callable[..., Journal] = Journal.open
    remembers_requests: bool = True  # 14
    refuses_by_value: bool = True  # 12
    breakage_is_expected: bool = False
    think_seconds: float = 0.03
