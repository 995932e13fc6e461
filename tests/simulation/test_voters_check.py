"""The check "no voter counts before it has caught up": silent about a change that was lost, loud about a real one."""

from collections.abc import Callable

import pytest

from chaos_tests.simulation import weather
from chaos_tests.simulation.process import Process
from chaos_tests.simulation.rig import WITHOUT, Rig
from chaos_tests.simulation.run import run
from chaos_tests.simulation.world import World
from cluster.raft.guard import Guard

TOO_SOON = "a voter counts before it has caught up"


def run_until(world: World, seconds: float, condition: Callable[[], bool]) -> None:
    deadline = world.clock.now + seconds
    while not condition():
        assert world.clock.now < deadline, "the simulated nodes did not get there in time"
        world.clock.run_until(world.clock.now + 0.05)


def acting_leader(world: World) -> Process | None:
    leader = world.leader()
    return leader if leader is not None and leader.core is not None and leader.core.guard.acting else None


def test_a_removal_that_was_lost_does_not_make_the_node_new_again() -> None:
    """Seed 390 at 60 s: the log of a leader that lost power held a removal and nobody else's did; later the next
    leader began from a snapshot, while that node, a voter all along, was far behind."""
    world = World(390, "members", Rig(), 5, weather.tuning("members"))
    run_until(world, 10.0, lambda: acting_leader(world) is not None)
    first = acting_leader(world)
    assert first is not None and first.core is not None and first.runtime is not None
    behind, *rest = [process for process in world.processes.values() if process is not first]
    for process in world.processes.values():
        world.network.cut_both(first.node_id, process.node_id)
        world.network.cut_both(behind.node_id, process.node_id)
    core, due = first.core, first.runtime.now() + 3.0
    first.deliver(lambda: core.control("remove", behind.node_id.encode(), due, lambda *_: None))
    assert core.membership.current.is_removed(behind.node_id)
    world.lose_power(first)

    def all_far_ahead() -> bool:
        here = behind.core.guard.last_index if behind.core is not None else 0
        return all(
            process.core is not None
            and (meta := process.core.store.latest()) is not None
            and meta.index > here + 200
            for process in rest
        )

    run_until(world, 60.0, all_far_ahead)
    for process in rest:
        world.lose_power(process)
        process.start()
    run_until(world, 10.0, lambda: acting_leader(world) is not None)
    assert not world.result.violations


def test_a_newcomer_that_counts_at_once_is_seen() -> None:
    violations = run(2, 12.0, WITHOUT["22-learner_first"]).violations
    assert violations and violations[0].startswith(TOO_SOON)


def test_a_learner_that_counts_on_a_wrong_word_of_what_it_has_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The leader looks where it should, and is told that every node has everything."""
    monkeypatch.setattr(Guard, "match_index", lambda self, node_id: self.last_index)
    violations = run(3, 12.0).violations
    assert violations and violations[0].startswith(TOO_SOON)
