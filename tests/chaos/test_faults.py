"""What comes next in a run, and which links a partition cuts."""

from __future__ import annotations

import itertools

import pytest

from chaos_tests import compounds, faults, peer_faults

KINDS = [f"kind {number}" for number in range(8)]


def test_every_kind_comes_once_before_any_comes_twice() -> None:
    schedule = faults.Schedule(KINDS, 3, (1.0, 5.0))
    first = [schedule.next() for _ in KINDS]
    assert sorted(name for _, name in first) == KINDS
    assert all(1 <= pause <= 5 for pause, _ in first)
    again = faults.Schedule(KINDS, 3, (1.0, 5.0))
    assert [again.next() for _ in KINDS] == first
    assert [faults.Schedule(KINDS, 4, (1.0, 5.0)).next() for _ in KINDS] != first


def test_what_has_not_bitten_comes_again_until_it_has() -> None:
    schedule = faults.Schedule(KINDS, 3, (1.0, 5.0))
    for _ in KINDS:
        _, name = schedule.next()
        schedule.done(name, name not in ("kind 2", "kind 5"))
    tried = [schedule.next()[1] for _ in range(2)]
    assert set(tried) & {"kind 2", "kind 5"}
    for _ in range(40):
        _, name = schedule.next()
        schedule.done(name, bit=True)
    assert not schedule._unbitten


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_ring_leaves_each_node_its_two_neighbours(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    cut = set(faults.ring_cuts(nodes, one_way=False))
    assert all((b, a) in cut for a, b in cut)
    heard = {node: {other for other in nodes if other != node and (other, node) not in cut} for node in nodes}
    if count > 3:
        for place, node in enumerate(nodes):
            assert heard[node] == {nodes[place - 1], nodes[(place + 1) % count]}
    else:  # of three, a bridge
        assert sorted(map(len, heard.values())) == [1, 1, 2]
    one_way = faults.ring_cuts(nodes, one_way=True)
    assert len(one_way) * 2 == len(cut) and not any((b, a) in one_way for a, b in one_way)


def test_every_fault_that_is_promised_is_there() -> None:
    promised = {
        "kill one", "kill the leader", "kill a majority", "kill all", "pause 0.3 s", "pause 2 s", "pause 10 s",
        "restart storm", "isolate the leader", "isolate the leader, outgoing", "isolate the leader, incoming", "halves",
        "halves, one way", "majorities ring", "majorities ring, one way", "bridge", "bridge, one way", "slow links",
        "narrow links", "lossy links", "garbled links", "doubled bytes", "connection resets", "clock step",
        "clock strobe", "disk full", "torn tail", "flipped bit", "missing segment", "missing data folder",
        "out of descriptors", "killed at the journal", "killed at the snapshot", "killed receiving a snapshot",
        "isolate the leader with writes pending, compact", "kill a majority at the snapshot's rename",
        "kill the leader in a membership change", compounds.MINORITY_GONE, compounds.MAJORITY_GONE,
    }  # fmt: skip
    assert promised <= set(compounds.KINDS)
    of_peers = {
        "peer killed", "peer paused", "peer's disk full", "peer's source damaged", "peer on a garbled line",
        "peer half-open", "flash crowd",
    }  # fmt: skip
    assert of_peers <= set(peer_faults.KINDS)


def test_all_steps_of_the_disk_are_kill_points_of_some_fault() -> None:
    areas = [name.partition(".")[0] for name in faults.kill_point_names()]
    assert {area for area, _ in itertools.groupby(areas)} == {
        "journal",
        "head",
        "folder",
        "snapshot",
        "receive",
    }
