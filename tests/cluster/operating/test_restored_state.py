"""What a process does about memory when a snapshot has replaced its state."""

from __future__ import annotations

import gc

from cluster.app import _restored


def test_a_restored_state_is_left_alone_by_the_collector() -> None:
    told: list[str] = []
    kept = [[number] for number in range(1000)]
    gc.collect()
    try:
        _restored(lambda: told.append("told"))
        assert told == ["told"], "whoever follows changes is told"
        assert gc.get_freeze_count() >= len(kept)
    finally:
        gc.unfreeze()
