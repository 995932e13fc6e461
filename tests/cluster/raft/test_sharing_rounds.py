"""What is shared: one entry for many proposals, one round for many reads; and what nobody waits for: the heartbeat."""

import random

from chaos_tests.simulation.replica import encode_command
from chaos_tests.simulation.rig import Rig
from chaos_tests.simulation.weather import ROOMY
from chaos_tests.simulation.world import World
from cluster.consensus import Applied, ProposalEnd
from cluster.raft.entries import decode_groups
from cluster.raft.messages import Probe, ProbeAck
from tests.cluster.raft.lone_node import LoneNode


def put(number: int) -> bytes:
    return encode_command(("put", f"r{number}", "k", "v"))


def test_what_comes_while_a_sync_runs_shares_the_next_entry() -> None:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    before = node.core.guard.last_index
    first = node.propose(put(0))
    node.pass_seconds(0.0)
    assert node.core.guard.last_index == before + 1, "the first does not wait for company"
    assert node.core.guard.journal.synced_index == before, "its sync is under way"
    others = [node.propose(put(number)) for number in range(1, 51)]
    node.pass_seconds(0.0)
    assert node.core.guard.last_index == before + 1, "they gather"
    node.pass_seconds(0.1)
    assert node.core.guard.last_index == before + 2
    ((_, _, commands),) = decode_groups(node.core.guard.journal[-1][0])
    assert commands == [put(number) for number in range(1, 51)]
    node.acknowledge("n2", before + 2)
    node.pass_seconds(0.1)
    assert [type(ends[0]) for ends in (first, *others)] == [Applied] * 51


def test_all_reads_that_wait_share_one_round_and_write_nothing() -> None:
    node = LoneNode()
    term = node.lead()
    for _ in range(15):
        node.acknowledge("n2", node.core.guard.last_index)
        node.pass_seconds(0.2)  # until the journal has sealed what it holds
    last, written, steps = node.core.guard.last_index, node.core.guard.journal.written, node.disk.steps
    node.sent.clear()
    done: list[bool] = []
    for _ in range(100):
        node.core.barrier(node.runtime.now() + 1, done.append)
    node.pass_seconds(0.0)
    rounds = {probe.round for probe in node.of(Probe)}
    assert len(rounds) == 1
    node.core.barrier(node.runtime.now() + 1, done.append)  # too late for this round
    node.hear("n2", ProbeAck(term, rounds.pop(), node.of(Probe)[-1].sent_at))
    assert done == [True] * 100
    node.pass_seconds(0.0)
    node.hear("n2", ProbeAck(term, node.of(Probe)[-1].round, node.of(Probe)[-1].sent_at))
    assert done == [True] * 101
    assert (node.core.guard.last_index, node.core.guard.journal.written) == (last, written)
    assert node.disk.steps == steps, "nothing was written"


def test_writes_and_reads_wait_for_no_heartbeat() -> None:
    """Links of 0.2 to 4 ms, syncs of 2 ms on average, heartbeats every 100 ms."""
    world = World(1, "sharing", Rig(), 3, dict(ROOMY))
    world.faults_over = True  # no clients but this one
    chance = random.Random(1)
    while (leader := world.leader()) is None or leader.core is None or not leader.core.guard.acting:
        assert world.clock.now < 10.0
        world.clock.run_until(world.clock.now + 0.1)
    took: dict[str, list[float]] = {"write": [], "read": []}
    for number in range(60):
        for kind in took:
            process = chance.choice(list(world.processes.values()))
            core, runtime = process.core, process.runtime
            assert core is not None and runtime is not None
            world.clock.run_until(world.clock.now + chance.uniform(0.0, 0.1))
            ended: list[ProposalEnd | bool] = []
            due = runtime.now() + 2.0
            if kind == "write":
                process.deliver(lambda core=core, due=due: core.submit(put(number), due, ended.append))  # type: ignore[misc]  # noqa: B023
            else:
                process.deliver(lambda core=core, due=due: core.barrier(due, ended.append))  # type: ignore[misc]  # noqa: B023
            began = world.clock.now
            while not ended:
                assert world.clock.now < began + 2.0
                world.clock.run_until(world.clock.now + 0.001)
            took[kind].append(world.clock.now - began)
    for kind, seconds in took.items():
        assert sorted(seconds)[30] < 0.02, kind
        assert max(seconds) < 0.06, kind
