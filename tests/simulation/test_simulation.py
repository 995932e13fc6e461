"""The simulation in the test run: sixty seeds hold, each correction is needed, stock PySyncObj fails, a seed fixes all."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import chaos_tests
from chaos_tests.simulation import weather
from chaos_tests.simulation.network import UNDER_WAY_MAX
from chaos_tests.simulation.process import ViolationError
from chaos_tests.simulation.rig import WITHOUT, Rig
from chaos_tests.simulation.run import kind_of, run, run_many, summarise
from chaos_tests.simulation.stock import CANARIES
from chaos_tests.simulation.world import Result, World
from cluster.raft.messages import Ack

SECONDS = 8.0

# For each correction a seed at which its absence shows. Only where to look first: all sixty count.
FIRST_LOOK = {
    "1-snapshot_never_commits": 3,
    "2-keep_suffix_after_snapshot": 0,
    "3-compaction_is_one_step": 20,
    "4-wait_for_sync": 0,
    "5-truncate_only_conflicts": 5,
    "6-compact_behind_snapshot_only": 1,
    "8-acks_carry_term": 8,
    "9-corrupt_snapshot_stops": 2,
    "10-torn_tail_is_dropped": 2,
    "11-vote_is_kept": 31,
    "12-refusals_are_values": 0,
    "13-read_barrier": 0,
    "14-requests_are_remembered": 0,
    "15-deadlines": 0,
    "16-stable_repair_hint": 1,
    "19-disk_full_survived": 2,
    "20-pre_vote": 6,
    "21-apply_before_answer": 0,
    "22-learner_first": 2,
    "22-membership_from_log": 3,
    "22-one_change_at_a_time": 3,
    "22-removed_is_told": 3,
    "23-keep_tail": 7,
}

# A fault that no longer bites is no fault: each of these must have, somewhere in the sixty seeds.
MUST_BITE = (
    "bytes_torn",
    "caller_gone",
    "connection_cut",
    "connection_reset",
    "cut_one_way",
    "disk_full",
    "cut_at_handover",
    "ended_while_receiving",
    "ended_at_append",
    "ended_at_sync",
    "ended_at_synced",
    "ended_by_failed_sync",
    "folder_vanished",
    "killed",
    "message_after_reconnect",
    "message_late",
    "message_lost",
    "message_retransmitted",
    "message_stalled",
    "names_unsynced",
    "operator_add",
    "operator_remove",
    "part_rotted",
    "paused",
    "power_lost",
    "power_lost_after_vote",
    "power_lost_everywhere",
    "refused_to_start",
    "removed_node_told",
    "rot",
    "slow_disk",
    "snapshot_resumed",
    "transfer_done",
    "unknown",
)


@pytest.mark.timeout(400)
def test_sixty_seeds_hold_and_every_fault_bites() -> None:
    failed, bites, acknowledged = [], dict.fromkeys(MUST_BITE, 0), 0
    for result in run_many(range(60), SECONDS):
        acknowledged += result.acknowledged
        for kind in MUST_BITE:
            bites[kind] += result.bites[kind]
        if result.violations:
            failed.append(f"make simulate SEED={result.seed} SECONDS={SECONDS:g}: {result.violations[0]}")
    assert not failed, "\n".join(failed)
    assert acknowledged > 5_000
    assert [kind for kind, count in bites.items() if not count] == []


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_without_one_correction_a_run_fails(name: str) -> None:
    first = FIRST_LOOK[name]
    seeds = [first, *(seed for seed in range(60) if kind_of(seed) == kind_of(first)), *range(60)]
    assert any(run(seed, 12.0, WITHOUT[name]).violations for seed in seeds), (
        f"{name} is not missed by anybody"
    )


def test_the_summary_says_what_was_run_what_bit_and_how_to_run_it_again() -> None:
    well = Result(7, "storm", 3000.0, 500, 20, 3, bites=Counter(killed=3, rot=1))
    wrong = Result(
        9, "members", 600.0, 41, 2, 1, ["two leaders in one term at 1.000 s: n1 and n2"], Counter(killed=2)
    )
    text = summarise([well, wrong], 12.0, 60.0)
    for part in (
        "seeds 2", "virtual hours 1.00", "writes acknowledged 541", "killed 5, rot 1", "violations 1",
        "seed 9 (members): two leaders in one term", "make simulate SEED=9 SECONDS=60",
    ):  # fmt: skip
        assert part in text


def test_the_track_record_names_the_seeds_that_are_run_here() -> None:
    record = (Path(chaos_tests.__path__[0]) / "README.md").read_text()
    assert [name for name, seed in FIRST_LOOK.items() if f"seed {seed} without `{name}`" not in record] == []


@pytest.mark.parametrize("finding", sorted(CANARIES, key=int))
def test_stock_engine_fails(finding: str) -> None:
    shown = [CANARIES[finding](seed) for seed in range(3)]
    assert any(shown), f"the canary for finding {finding} passes: the simulation has lost its teeth"


def test_a_seed_fixes_everything_whatever_the_hash_seed() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        for seed in ("3", "0"):
            command = [sys.executable, "-m", "chaos_tests.simulation", "--seed", seed, "--seconds", "6"]
            environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            digests.add((seed, done.stdout.splitlines()[0]))
    assert len(digests) == 2, digests


def test_a_node_that_sends_without_end_is_a_violation_and_not_the_end_of_the_memory() -> None:
    world = World(0, "storm", Rig(), 3, weather.tuning("storm"))
    world.clock.run_until(2.0)
    one, other = sorted(world.network.endpoints)[:2]
    with pytest.raises(ViolationError):
        for _ in range(10 * UNDER_WAY_MAX):
            assert world.network.send(one, other, Ack(1, 1, False, False, 0.0))
    assert world.result.violations[0].startswith("a node sends without end")
    world.finish()
