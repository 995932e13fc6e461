"""A snapshot that is received over several lives of a process: the simulation sees it resumed, and sees it go wrong."""

from collections.abc import Callable

import pytest

from chaos_tests.simulation.run import kind_of, run
from cluster.raft.snapshots import SnapshotReceiver

SEEDS = [seed for seed in range(60) if kind_of(seed) == "receiving"]


def test_receives_are_interrupted_gone_on_with_and_end_well() -> None:
    result = run(SEEDS[1], 20.0)
    assert not result.violations
    assert result.bites["ended_while_receiving"] > 5
    assert result.bites["snapshot_resumed"] > 2


def test_a_part_that_is_installed_unseen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: SnapshotReceiver, callback: Callable[[OSError | ValueError | None], None]) -> None:
        self._output.finish(None, callback)  # what was announced is not compared

    monkeypatch.setattr(SnapshotReceiver, "finish", finish)
    found = [violation for seed in SEEDS for violation in run(seed, 20.0).violations]
    assert found, "a rotten part passed for a state"
