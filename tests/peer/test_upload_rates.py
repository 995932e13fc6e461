"""The limits of what is sent, and the slots of sends that wait for them, against naive models."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.sender import SENDS_MAX_HELD, Busy, UploadQueue
from peer.upload_rates import KEPT_MIN, STRETCH_BYTES_MAX, STRETCH_BYTES_MIN, UploadRates

BURST = 64 << 10


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200_000), st.floats(0, 2)), max_size=60),
    st.integers(20_000, 2_000_000),
)
def test_nobody_gets_more_than_its_limit_whatever_the_others_take(
    steps: list[tuple[int, int, float]], each: int
) -> None:
    """The model: what a downloader has had by a time is its burst and its rate since it first came, at most; and it
    waits no longer than that takes."""
    rates = UploadRates(each=each)
    burst = max(BURST, each * 0.05)
    credit: dict[str, tuple[float, float]] = {}  # and when
    now = 0.0
    for who, count, passed in steps:
        now += passed
        had, at = credit.get(f"d{who}", (burst, now))
        left = min(burst, had + (now - at) * each) - count
        credit[f"d{who}"] = left, now
        waits = rates.take_own(f"d{who}", count, now)
        assert abs(waits - max(0.0, -left / each)) < 1e-6


def test_without_a_limit_nobody_waits_and_nobody_is_remembered() -> None:
    rates = UploadRates()
    assert not rates.limited
    assert rates.take_own("a", 1 << 40, 0.0) == 0.0
    rates.set_rates(0, 1000, 0.0)
    assert rates.limited
    assert rates.take_own("a", BURST + 500, 0.0) == 0.5
    assert rates.take_own("b", BURST, 0.0) == 0.0, "of another's bytes it knows nothing"
    rates.set_rates(0, 2000, 0.0)
    assert rates.take_own("a", 0, 0.0) == 0.25, "what it owes is waited for at the new rate"
    rates.set_rates(5000, 0, 0.0)
    assert rates.limited
    assert len(rates) == 0
    assert rates.take_own("a", 1 << 40, 0.0) == 0.0
    rates.set_rates(0, 0, 0.0)
    assert not rates.limited


def test_who_went_away_is_forgotten_and_who_owes_is_not() -> None:
    rates = UploadRates(each=100_000)
    most = 0
    for number in range(20 * KEPT_MIN):
        rates.take_own(f"gone{number}", BURST, 60.0 * number)
        rates.take_own("owes", 100_000 * 60, 60.0 * number)
        most = max(most, len(rates))
    assert most <= KEPT_MIN
    # All that it took but its burst, over what the time since was good for.
    took, seconds = 20 * KEPT_MIN * 6_000_000, 60.0 * (20 * KEPT_MIN - 1)
    assert abs(rates.take_own("owes", 0, seconds) - ((took - BURST) / 100_000 - seconds)) < 1e-3


def test_a_slow_limit_is_sent_in_small_stretches() -> None:
    """Else a reader would take its sender for a silent one."""
    assert UploadRates().stretch_bytes == STRETCH_BYTES_MAX
    assert UploadRates(each=20 << 20).stretch_bytes == STRETCH_BYTES_MAX
    assert UploadRates(total=20 << 20, each=100_000).stretch_bytes == 10_000
    assert UploadRates(total=1).stretch_bytes == STRETCH_BYTES_MIN
    assert UploadRates(total=20 << 20, each=100_000).bytes_per_second == 100_000
    assert UploadRates(total=1000, each=100_000).bytes_per_second == 1000


@pytest.mark.parametrize(("sends", "others"), [(1, 1), (3, 1), (4, 2), (2, 3)])
def test_a_total_is_divided_among_downloaders_whatever_the_number_of_their_sends(
    sends: int, others: int
) -> None:
    rates = UploadRates(total=4 << 20)
    queue = UploadQueue(sends_max=8)
    who = ["a"] * sends + ["b"] * others
    for ticket, downloader in enumerate(who):
        assert queue.ask(downloader, ticket, 0.0) is True
    free_at = dict.fromkeys(range(len(who)), 0.0)
    moved = {"a": 0, "b": 0}
    while min(free_at.values()) < 10:
        ticket = min(free_at, key=lambda each: free_at[each])
        now, downloader = free_at[ticket], who[ticket]
        count = rates.stretch_of(queue.sends_beside(downloader))
        free_at[ticket] = now + rates.total.take(count, now) + 1e-9 * ticket
        moved[downloader] += count
    assert 0.97 <= sum(moved.values()) / (40 << 20) <= 1.03
    assert 0.48 <= moved["a"] / sum(moved.values()) <= 0.52


def test_a_stretch_is_shared_by_the_sends_of_one_downloader_beside_others() -> None:
    rates, queue = UploadRates(total=20 << 20), UploadQueue()
    for ticket in range(4):
        queue.ask("a", ticket, 0.0)
    assert queue.sends_beside("a") == 1, "alone"
    queue.finished(0, 0.0)
    queue.ask("b", 9, 0.0)
    assert (queue.sends_beside("a"), queue.sends_beside("b"), queue.sends_beside("c")) == (3, 1, 1)
    assert rates.stretch_of(4) == 16 << 10
    assert rates.stretch_of(16) == 16 << 10, "less would cost too many calls"
    rates.set_rates(50_000, 0, 0.0)
    assert rates.stretch_of(16) == rates.stretch_bytes == 5000


# ---- slots -----------------------------------------------------------------------------------------------------


def test_a_held_send_leaves_its_slot_to_others_and_its_downloader_gets_no_second() -> None:
    queue = UploadQueue(sends_max=1, sends_max_unfilled=1)
    assert queue.ask("slow", 1, 0.0) is True
    assert queue.ask("slow", 2, 0.0) is False
    assert queue.ask("other", 3, 0.0) is False
    assert queue.held(1, 0.0) == [3]
    assert queue.ask("slow", 4, 0.0) is False
    assert queue.held(3, 0.0) == [], "both wait for themselves now"
    assert queue.ask("third", 5, 0.0) is True
    assert (queue.declared(0.0).sending, queue.declared(0.0).slots) == (3, 3)
    queue.went_on(1)
    assert queue.ask("fourth", 6, 0.0) is False, "there are two that use the link"
    assert queue.held(5, 0.0) == []
    assert queue.finished(1, 1.0) == [2]
    assert queue.finished(3, 1.0) == []
    assert queue.held(2, 1.0) == [6]


def test_slots_that_are_given_are_all_there_are() -> None:
    queue = UploadQueue()
    assert queue.set_slots(2, 0.0, 0.0) == []
    assert [queue.ask(f"d{ticket}", ticket, 0.0) for ticket in range(5)] == [True, True, False, False, False]
    assert queue.held(0, 0.0) == []
    assert queue.held(1, 0.0) == []
    assert queue.declared(0.0).slots == 2
    assert queue.set_slots(3, 0.0, 0.0) == [2]
    assert queue.set_slots(0, 0.0, 0.0) == [3, 4]


@pytest.mark.parametrize(("limit", "granted"), [(0, [5]), (100_000, [])])
def test_a_link_that_is_limited_is_full_at_its_limit(limit: int, granted: list[int]) -> None:
    queue = UploadQueue()
    assert [queue.ask("a", ticket, 0.0) for ticket in range(4)] == [True] * 4
    queue.moved(64 << 10, 0.0001)  # a burst, which is no measure of what goes out under a limit
    assert queue.ask("b", 5, 0.0001) is False
    for tick in range(40):
        queue.moved(10_000, 0.1 * (tick + 1))
    assert queue.set_slots(0, limit, 4.0) == granted


def test_who_must_come_back_is_told_when_its_own_send_ends() -> None:
    queue = UploadQueue(sends_max=1, sends_max_unfilled=1, queue_per_downloader_max=1)
    queue.ask("slow", 1, 0.0)
    queue.finished(1, 6.0)  # a send takes six seconds
    queue.ask("slow", 2, 6.0)
    queue.held(2, 6.0)
    assert queue.ask("slow", 3, 6.0) is False
    busy = queue.ask("slow", 4, 8.0)
    assert isinstance(busy, Busy)
    assert busy.retry_after_seconds == 4.0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=120),
    st.integers(1, 4),
    st.integers(4, 8),
)
def test_held_sends_against_a_naive_model(steps: list[tuple[int, int]], slots: int, most: int) -> None:
    queue = UploadQueue(
        sends_max=slots, sends_max_unfilled=slots, sends_max_held=most, queue_per_downloader_max=100
    )
    sending: dict[int, str] = {}
    held: set[int] = set()
    waiting: list[tuple[str, int]] = []

    def room() -> bool:
        return len(sending) < most and len(sending) - len(held) < slots

    def of_held() -> set[str]:
        return {sending[each] for each in held}

    def granted(tickets: list[int]) -> None:
        for ticket in tickets:
            (found,) = [each for each in waiting if each[1] == ticket]
            waiting.remove(found)
            sending[ticket] = found[0]

    for ticket, (what, who) in enumerate(steps):
        now = ticket / 10
        if what == 0:
            name = f"d{who}"
            expected = room() and name not in of_held() and all(other != name for other, _ in waiting)
            waiting.append((name, ticket))
            assert queue.ask(name, ticket, now) is expected
            if expected:
                granted([ticket])
        elif sending:
            chosen = list(sending)[who % len(sending)]
            if what == 1:
                held.add(chosen)
                granted(queue.held(chosen, now))
            elif what == 2:
                held.discard(chosen)
                queue.went_on(chosen)
                # It goes on beside those that got its slot: nobody is granted, nor stopped.
            else:
                held.discard(chosen)
                del sending[chosen]
                granted(queue.finished(chosen, now))
            if (
                what != 2
            ):  # whoever still waits does so because there is no room, or because its own limit holds it
                assert not room() or all(name in of_held() for name, _ in waiting)
        assert len(sending) <= most
        declared = queue.declared(now)
        assert (declared.sending, declared.queued) == (len(sending), len(waiting))
        assert declared.slots == min(most, slots + len(held))


def test_one_downloader_cannot_take_all_that_may_be_held() -> None:
    queue = UploadQueue()
    for ticket in range(20):
        if queue.ask("slow", ticket, 0.0) is True:
            assert queue.held(ticket, 0.0) == []
    for number in range(SENDS_MAX_HELD - 1):
        assert queue.ask(f"d{number}", 100 + number, 0.0) is True
        assert queue.held(100 + number, 0.0) == []
    assert queue.ask("one too many", 999, 0.0) is False
    assert queue.finished(100, 1.0) == [999], "the one that waits for itself has its turn when that has ended"
