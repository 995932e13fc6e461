"""Whole swarms on a simulated network (`swarm_sim.py`), against the fluid bound of Kumar and Ross.

`make swarm` (TRIMARAN_SWARM=long) adds the long ones: a flash crowd of 500, and more seeds.
"""

from __future__ import annotations

import os

import pytest

from peer.bitmap import full_mask
from peer.swarm_events import Fault, PeerJoined, WaitReason
from tests.peer.swarm_sim import Swarm

MIB = 1 << 20
LONG = os.environ.get("TRIMARAN_SWARM") == "long"
SEEDS = range(5) if LONG else range(1)


def crowd(swarm: Swarm, leechers: int, up: float, **more: float) -> None:
    swarm.add_seeder("seeder", up=up)
    for number in range(leechers):
        swarm.add(f"leecher{number}", up=up, **more)


def sends_until_each_went_out(swarm: Swarm) -> int:
    seen: set[int] = set()
    for count, index in enumerate(swarm.peers["seeder"].sent, 1):
        seen.add(index)
        if len(seen) == swarm.pieces:
            return count
    raise AssertionError("not every piece went out")


@pytest.mark.parametrize("seed", SEEDS)
def test_one_to_eight_at_the_bound_of_the_links(seed: int) -> None:
    swarm = Swarm(128 * MIB, seed=seed)
    crowd(swarm, 8, 20e6)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 1.08 * bound
    assert sends_until_each_went_out(swarm) <= 1.02 * swarm.pieces
    duplicates = sum(peer.download.duplicate_pieces for peer in swarm.peers.values())
    assert duplicates <= 0.01 * 8 * swarm.pieces


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flash_crowd_of_32(seed: int) -> None:
    swarm = Swarm(32 * MIB, seed=seed)
    crowd(swarm, 32, 5e6)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 1.4 * bound
    assert sends_until_each_went_out(swarm) <= 1.02 * swarm.pieces


@pytest.mark.parametrize("seed", SEEDS)
def test_unequal_seeders_give_the_sum_of_their_rates(seed: int) -> None:
    swarm = Swarm(256 * MIB, seed=seed)
    for rate in (2e6, 8e6, 32e6):
        swarm.add_seeder(f"seeder{rate}", up=rate)
    swarm.add("leecher", up=1e6)
    assert swarm.run_until_done(60)
    # What is lost is the start, and at the end no more than a piece of each: none holds up the others.
    assert swarm.size_bytes / swarm.finish_seconds() >= 0.985 * 42e6
    assert all(peer.sent for peer in swarm.peers.values() if peer.name != "leecher")


def test_a_pipeline_as_deep_as_the_path() -> None:
    """100 ms round trip at 100 Mbit/s, pieces of 256 KiB: one at a time would reach a quarter of the link."""
    swarm = Swarm(64 * MIB)
    swarm.add_seeder("seeder", up=12.5e6, delay=0.025)
    swarm.add("leecher", up=12.5e6, delay=0.025)
    assert swarm.run_until_done(60)
    assert swarm.size_bytes / swarm.finish_seconds() >= 0.9 * 12.5e6


def test_equal_seeders_share_the_work() -> None:
    swarm = Swarm(64 * MIB)
    one, two = (swarm.add_seeder(name, up=50e6) for name in ("one", "two"))
    swarm.add("leecher", up=50e6)
    assert swarm.run_until_done(60)
    assert min(one.sent_bytes, two.sent_bytes) >= 0.3 * swarm.size_bytes


def test_two_full_seeders_do_not_send_a_crowd_the_same() -> None:
    swarm = Swarm(64 * MIB)
    one, two = (swarm.add_seeder(name, up=10e6) for name in ("one", "two"))
    for number in range(8):
        swarm.add(f"leecher{number}", up=10e6)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 1.25 * bound
    first = swarm.pieces // 2
    assert len(set(one.sent[:first]) & set(two.sent[:first])) <= 0.06 * swarm.pieces


def test_the_rate_of_a_seeder_falls_and_others_carry_its_share() -> None:
    swarm = Swarm(128 * MIB)
    slow = swarm.add_seeder("slow", up=10e6)
    swarm.add_seeder("other", up=10e6)
    swarm.add("leecher", up=1e6)
    swarm.at(4.0, setattr, slow, "up", 1e6)
    assert swarm.run_until_done(60)
    bound = 4.0 + (swarm.size_bytes - 4.0 * 20e6) / 11e6
    assert swarm.finish_seconds() <= 1.05 * bound


def test_a_seeder_that_joins_is_used_within_a_second() -> None:
    swarm = Swarm(64 * MIB)
    swarm.add_seeder("first", up=4e6)
    swarm.add("leecher", up=1e6)
    swarm.at(3.0, lambda: swarm.add_seeder("second", up=20e6))
    used: list[int] = []
    swarm.at(4.0, lambda: used.append(len(swarm.peers["second"].sent)))
    assert swarm.run_until_done(60)
    assert used[0] > 0


@pytest.mark.parametrize("graceful", [True, False])
def test_the_only_seeder_dies_after_each_piece_went_out(graceful: bool) -> None:
    swarm = Swarm(32 * MIB)
    crowd(swarm, 12, 5e6)
    seeder = swarm.peers["seeder"]
    # Every byte left it some seconds ago, though no leecher has everything.
    assert swarm.run(lambda: len(set(seeder.sent)) == swarm.pieces and not seeder.sending, 30) or True
    held = 0
    for peer in swarm.peers.values():
        if peer is not seeder:
            held |= peer.download.have
    if held != full_mask(swarm.pieces):  # the last ones may still be in flight: let them land
        assert swarm.run(lambda: _held(swarm, seeder.name) == full_mask(swarm.pieces), 30)
    assert swarm.unfinished
    swarm.kill(seeder, graceful=graceful)
    assert swarm.run_until_done(swarm.now + 30)


def _held(swarm: Swarm, without: str) -> int:
    held = 0
    for peer in swarm.peers.values():
        if peer.name != without and peer.alive:
            held |= peer.download.have
    return held


def test_a_seeder_dies_in_the_middle_and_the_rest_goes_on() -> None:
    swarm = Swarm(64 * MIB)
    for name in ("one", "two"):
        swarm.add_seeder(name, up=10e6)
    for number in range(6):
        swarm.add(f"leecher{number}", up=5e6)
    swarm.at(3.0, lambda: swarm.kill(swarm.peers["one"]))
    assert swarm.run_until_done(60)


def test_all_seeders_gone_is_said_and_ends_when_one_returns() -> None:
    swarm = Swarm(16 * MIB)
    crowd(swarm, 3, 5e6)
    swarm.at(1.0, lambda: swarm.kill(swarm.peers["seeder"]))
    assert not swarm.run_until_done(120)
    leecher = swarm.peers["leecher0"]
    assert leecher.download.waiting in (WaitReason.PIECES_MISSING, WaitReason.NO_PEERS)
    assert _held(swarm, "seeder") == swarm.peers["leecher1"].download.have, "what they have, all of them have"
    swarm.add_seeder("another", up=5e6)
    assert swarm.run_until_done(200)


def test_one_liar_among_many_is_cut_off_by_each_after_one_piece() -> None:
    swarm = Swarm(32 * MIB)
    crowd(swarm, 10, 5e6)
    liar = swarm.add("liar", up=50e6, have=full_mask(swarm.pieces), liar=True)
    assert swarm.run_until_done(60)
    for peer in swarm.peers.values():
        if peer.name.startswith("leecher"):
            assert peer.wrong_received <= 4, "more than its first requests were answered by the liar"
            if peer.wrong_received:
                assert peer.download.is_banned("liar")
                assert [r.fault for r in peer.reports if r.peer == "liar"] == [Fault.BAD_PIECE]
            assert not [r for r in peer.reports if r.peer != "liar" and r.fault is Fault.BAD_PIECE]
    assert len(liar.sent) <= 4 * 10


def test_one_that_never_answers_holds_nobody_up_for_long() -> None:
    swarm = Swarm(32 * MIB)
    crowd(swarm, 6, 5e6)
    swarm.add("mute", up=5e6, have=full_mask(swarm.pieces), mute=True)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 2 * bound + 1


def test_one_slow_among_many_holds_nobody_up() -> None:
    swarm = Swarm(64 * MIB)
    for number in range(6):
        swarm.add_seeder(f"seeder{number}", up=5e6)
    swarm.add_seeder("slow", up=20e3)  # a piece in 13 s
    swarm.add("leecher", up=1e6)
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 1.1 * swarm.size_bytes / 30e6 + 0.2


def test_askers_that_never_confirm_use_nothing_up() -> None:
    swarm = Swarm(16 * MIB)
    crowd(swarm, 6, 5e6)
    for number in range(2):
        swarm.add(f"silent{number}", up=5e6, confirms=False)
    assert swarm.run_until_done(60)


TOKEN_SECONDS = 1800.0  # as trackers give them


@pytest.mark.parametrize("minutes", [10, 60])
def test_all_trackers_gone(minutes: int) -> None:
    """Those who know one peer find the others from it, though no tracker ever told them. Ten minutes are noticed by
    nobody. In an hour all tokens end: then everyone waits, says why, gets nothing, and goes on by itself."""
    up = 1e6
    size = int((minutes + 5) * 60 * up)  # the whole download falls into the outage
    swarm = Swarm(size, piece_bytes=4 * MIB, token_seconds=TOKEN_SECONDS)
    crowd(swarm, 6, up)
    assert swarm.run(lambda: all(peer.links for peer in swarm.peers.values()), 5)
    for peer in swarm.peers.values():
        peer.waits.clear()
    swarm.tracker(False)
    late = swarm.add("late", up=up)
    late.token_until = TOKEN_SECONDS  # had before
    swarm.at(TOKEN_SECONDS, swarm._token_ends, late)
    late.download.feed(PeerJoined("leecher0", ("x",)), swarm.now)  # remembered from before
    gone_seconds = minutes * 60.0
    assert not swarm.run(lambda: swarm.now >= gone_seconds and swarm.all_done(), gone_seconds)
    assert len(late.links) > 2
    told = {reason for peer in swarm.peers.values() if peer is not late for reason in peer.waits}
    if gone_seconds < TOKEN_SECONDS / 2:
        assert told <= {WaitReason.BUSY}, "somebody noticed"
    else:
        leechers = [peer for peer in swarm.peers.values() if not peer.download.done]
        assert leechers
        assert all(peer.download.waiting is WaitReason.TOKEN_EXPIRED for peer in leechers)
        assert told <= {WaitReason.BUSY, WaitReason.TOKEN_EXPIRED}, "nobody ran out of peers"
    swarm.tracker(True)
    assert swarm.run_until_done(gone_seconds + size / up * 3)
    assert swarm.late_bytes == 0, "somebody was served after its token had ended"


def test_storms_of_joins_and_leaves() -> None:
    swarm = Swarm(16 * MIB, seed=4)
    crowd(swarm, 10, 5e6)
    for number in range(60):
        swarm.at(0.1 * number, lambda name=f"guest{number}": swarm.add(name, up=5e6))

        def leave(name: str = f"guest{number}", graceful: bool = bool(number % 2)) -> None:
            swarm.kill(swarm.peers[name], graceful=graceful)

        if number % 3:
            swarm.at(0.1 * number + 1.5, leave)
    assert swarm.run(lambda: swarm.now > 7.5 and swarm.all_done(), 60)
    everything = full_mask(swarm.pieces)
    assert all(peer.download.have == everything for peer in swarm.peers.values() if peer.alive)


def test_a_file_of_one_piece_and_one_of_none() -> None:
    small = Swarm(1000)
    crowd(small, 5, 1e6)
    assert small.run_until_done(10)
    empty = Swarm(0)
    crowd(empty, 2, 1e6)
    assert empty.run_until_done(10)


@pytest.mark.skipif(not LONG, reason="about a minute; `make swarm` runs it")
@pytest.mark.timeout(1200)
def test_a_flash_crowd_of_500() -> None:
    swarm = Swarm(8 * MIB)
    crowd(swarm, 500, 5e6)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(120)
    assert (
        swarm.finish_seconds() <= 6 * bound
    )  # 32 pieces only: the start, one piece at a time, is most of it


def test_a_flash_crowd_of_100() -> None:
    swarm = Swarm(8 * MIB)
    crowd(swarm, 100, 5e6)
    bound = swarm.bound_seconds()
    assert swarm.run_until_done(60)
    assert swarm.finish_seconds() <= 3 * bound
