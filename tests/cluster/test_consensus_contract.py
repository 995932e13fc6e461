"""What the service relies on, asked of the stand-in in memory and of real Raft nodes alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from memory_consensus import MemoryCluster
from trackers import until

from chaos_tests.ports import free_ports
from cluster.consensus import Applied, BarrierError, Consensus, NodeInfo, Refusal, Rejected, Unknown
from cluster.raft.node import open_node
from cluster.raft.settings import RaftSettings
from state_machine import codec, outcomes
from state_machine.commands import CreateGroup, RegisterUser
from state_machine.machine import StateMachine

DEADLINE = 5.0


@dataclass
class Cluster:
    nodes: list[Consensus]
    machines: list[StateMachine]
    isolate: Callable[[], Awaitable[None]]  # leave the first node without a majority
    leadership: list[list[bool]]

    @property
    def leader(self) -> int:
        return next(number for number, node in enumerate(self.nodes) if node.is_leader())


def _real(folder: Path, machines: list[StateMachine]) -> list[Consensus]:
    infos = tuple(
        NodeInfo(f"n{number}", f"127.0.0.1:{port}", f"http://127.0.0.1:{number}", "")
        for number, port in enumerate(free_ports(3), 1)
    )
    return [
        open_node(
            RaftSettings(node=info, cluster_id="contract", founders=infos),
            machine,
            data_dir=folder / info.node_id,
        )
        for info, machine in zip(infos, machines, strict=True)
    ]


@pytest.fixture(params=["memory", "raft"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    machines = [StateMachine() for _ in range(3)]
    nodes: list[Consensus]
    if request.param == "memory":
        memory = MemoryCluster()
        nodes = [memory.add(f"n{number + 1}", machine) for number, machine in enumerate(machines)]

        async def isolate() -> None:
            memory.nodes["n1"].cut_off = True
    else:
        nodes = _real(tmp_path, machines)

        async def isolate() -> None:
            await asyncio.gather(nodes[1].stop(), nodes[2].stop())

    leadership: list[list[bool]] = [[] for _ in nodes]
    for node, told in zip(nodes, leadership, strict=True):
        node.on_leadership(told.append)
    for node in nodes:
        await node.start()
    try:
        await until(lambda: any(node.is_leader() for node in nodes), 10)
        await until(lambda: all(node.status().leader for node in nodes), 10)
        yield Cluster(nodes, machines, isolate, leadership)
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))


def user(name: str) -> bytes:
    return codec.encode(RegisterUser(name, "hash", 0))


async def test_what_is_applied_comes_with_the_machines_answer(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes):
        end = await node.propose(user(f"u{number}"), deadline_seconds=DEADLINE)
        assert isinstance(end, Applied)
        assert isinstance(end.result, outcomes.Applied)
        assert end.result.value == {"user": f"u{number}"}
        assert f"u{number}" in cluster.machines[number].state.users, "it is applied on the asked node"


async def test_a_refusal_is_an_answer_and_so_is_nonsense(cluster: Cluster) -> None:
    for command, code in (
        (codec.encode(CreateGroup("g", "nobody", 0)), outcomes.Code.DENIED),
        (b"\xc1 nonsense", outcomes.Code.MALFORMED),
    ):
        end = await cluster.nodes[0].propose(command, deadline_seconds=DEADLINE)
        assert isinstance(end, Applied)
        assert isinstance(end.result, outcomes.Refused)
        assert end.result.code is code


async def test_many_at_once_each_get_their_own_answer(cluster: Cluster) -> None:
    async def one(number: int) -> None:
        node = cluster.nodes[number % 3]
        end = await node.propose(user(f"u{number}"), deadline_seconds=DEADLINE)
        assert isinstance(end, Applied)
        assert end.result.value == {"user": f"u{number}"}

    await asyncio.gather(*(one(number) for number in range(300)))
    for node in cluster.nodes:
        await node.read_barrier(deadline_seconds=DEADLINE)
    assert len({machine.digest() for machine in cluster.machines}) == 1
    assert cluster.machines[0].revision == 300


async def test_a_barrier_shows_what_was_acknowledged_anywhere(cluster: Cluster) -> None:
    for number in range(30):
        asked, reading = number % 3, (number + 1) % 3
        end = await cluster.nodes[asked].propose(user(f"u{number}"), deadline_seconds=DEADLINE)
        assert isinstance(end, Applied)
        await cluster.nodes[reading].read_barrier(deadline_seconds=DEADLINE)
        assert f"u{number}" in cluster.machines[reading].state.users


async def test_one_leads_and_all_know_it(cluster: Cluster) -> None:
    leader = cluster.leader
    assert [node.is_leader() for node in cluster.nodes].count(True) == 1
    assert cluster.nodes[leader].node_id == f"n{leader + 1}"
    for node in cluster.nodes:
        status = node.status()
        assert status.leader == f"n{leader + 1}"
        assert status.quorum
        assert sorted(seen.info.node_id for seen in status.nodes) == ["n1", "n2", "n3"]
        await until(lambda: node.quorum_age_seconds() < 0.5)  # noqa: B023
    assert cluster.leadership[leader][-1:] == [True]


async def test_without_a_majority_every_call_ends_before_its_deadline(cluster: Cluster) -> None:
    await cluster.isolate()
    loop = asyncio.get_running_loop()
    for _ in range(3):
        begun = loop.time()
        end = await cluster.nodes[0].propose(user("lost"), deadline_seconds=1.0)
        assert isinstance(end, Rejected | Unknown)
        with pytest.raises(BarrierError):
            await cluster.nodes[0].read_barrier(deadline_seconds=1.0)
        assert loop.time() - begun < 2.5
    await until(lambda: cluster.nodes[0].quorum_age_seconds() > 0.5)
    await until(lambda: not cluster.nodes[0].is_leader())
    assert not cluster.nodes[0].status().quorum


async def test_a_stopped_node_takes_nothing(cluster: Cluster) -> None:
    await cluster.nodes[0].stop()
    end = await cluster.nodes[0].propose(user("late"), deadline_seconds=1.0)
    assert isinstance(end, Rejected)
    assert end.refusal is Refusal.STOPPING
