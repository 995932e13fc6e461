"""The sender's choice and the upload queue, also against naive models."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from peer.bitmap import full_mask, indices_of
from peer.pacer import Pacer, take_all
from peer.rates import Delivery, Latency, Rate
from peer.sender import Busy, SendersChoice, UploadQueue


def test_each_piece_goes_out_once_then_there_is_nothing_to_choose() -> None:
    choice = SendersChoice("s", "m", 100, full_mask(100))
    sent = []
    for number in range(100):
        asker = f"a{number % 3}"
        index = choice.choose(asker, full_mask(100), 0.0)
        assert index is not None
        choice.started(asker, index, 0.0, 1.0)
        sent.append(index)
    assert sorted(sent) == list(range(100))
    assert choice.choose("a9", full_mask(100), 0.0) is None


def test_an_asker_that_never_confirms_uses_nothing_up() -> None:
    choice = SendersChoice("s", "m", 4, full_mask(4))
    for _ in range(4):
        index = choice.choose("liar", full_mask(4), 0.0)
        assert index is not None
        choice.started("liar", index, 0.0, 0.1)
    assert choice.choose("other", full_mask(4), 1.0) is None
    assert choice.choose("other", full_mask(4), 2.5) is not None


def test_a_confirmed_send_counts_until_its_holder_leaves() -> None:
    choice = SendersChoice("s", "m", 1, 1)
    choice.linked("a", 0)
    choice.started("a", 0, 0.0, 0.1)
    choice.has("a", 1)
    assert choice.choose("b", 1, 100.0) is None
    choice.unlinked("a")
    assert choice.choose("b", 1, 100.0) == 0


def test_a_broken_send_counts_no_more_and_full_seeders_do_not_count() -> None:
    choice = SendersChoice("s", "m", 2, 0b11)
    choice.linked("seeder", 0b11)
    choice.started("a", 0, 0.0, 1.0)
    choice.started("a", 1, 0.0, 1.0)
    assert choice.choose("b", 0b11, 0.0) is None
    choice.failed("a", 1)
    assert choice.choose("b", 0b11, 0.0) == 1


def test_only_what_is_wanted_held_and_not_known_to_be_there() -> None:
    choice = SendersChoice("s", "m", 8, 0b00001111)
    choice.linked("a", 0b00000001)
    seen = {choice.choose("a", 0b11110111, 0.0) for _ in range(50)}
    assert seen == {1, 2}
    choice.gained(0b10000000)
    choice.lost(0b00000110)
    assert choice.choose("a", 0b11110111, 0.0) == 7


def test_two_seeders_begin_in_different_places() -> None:
    firsts = {
        SendersChoice(f"s{n}", "m", 4096, full_mask(4096)).choose("a", full_mask(4096), 0.0)
        for n in range(20)
    }
    assert len(firsts) > 15


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 255)), max_size=60))
def test_the_choice_against_a_naive_model(steps: list[tuple[int, int, int]]) -> None:
    choice = SendersChoice("s", "m", 8, 255)
    known: dict[str, set[int]] = {}
    counted: dict[str, set[int]] = {}
    sends: dict[tuple[str, int], float] = {}
    now = 0.0
    for what, who, value in steps:
        peer = f"p{who}"
        now += value / 100
        pieces = set(indices_of(value))
        match what:
            case 0:
                choice.linked(peer, value)
                known[peer] = set(pieces)
                counted[peer] = set() if value == 255 else set(pieces)
            case 1:
                choice.has(peer, value)
                if peer in known:
                    for index in pieces - known[peer]:
                        sends.pop((peer, index), None)
                    counted[peer] |= pieces - known[peer]
                    known[peer] |= pieces
            case 2:
                choice.unlinked(peer)
                known.pop(peer, None)
                counted.pop(peer, None)
            case 3:
                choice.failed(peer, value % 8)
                sends.pop((peer, value % 8), None)
            case _:
                sends = {key: end for key, end in sends.items() if end > now}
                out = {index for _, index in sends} | set().union(*counted.values())
                candidates = pieces - known.get(peer, set()) - out
                chosen = choice.choose(peer, value, now)
                assert (chosen in candidates) if candidates else chosen is None
                if chosen is not None:
                    choice.started(peer, chosen, now, 1.0)
                    sends[(peer, chosen)] = now + 4.0


# ---- slots -----------------------------------------------------------------------------------------------------


def test_downloaders_take_turns() -> None:
    queue = UploadQueue(sends_max=1, sends_max_unfilled=1)
    assert queue.ask("greedy", 1, 0.0) is True
    for ticket in range(2, 7):
        assert queue.ask("greedy", ticket, 0.0) is False
    assert queue.ask("modest", 7, 0.0) is False
    order = []
    current = 1
    for _ in range(6):
        (current,) = queue.finished(current, 1.0)
        order.append(current)
    assert order.index(7) <= 1


def test_the_next_slot_is_of_who_is_sent_least() -> None:
    queue = UploadQueue(sends_max=4, sends_max_unfilled=4)
    assert [queue.ask("greedy", ticket, 0.0) for ticket in range(8)] == [True] * 4 + [False] * 4
    assert [queue.ask("modest", ticket, 0.0) for ticket in (10, 11, 12)] == [False] * 3
    assert [queue.finished(ticket, 1.0) for ticket in range(2)] == [[10], [11]]
    assert queue.ask("newcomer", 20, 1.0) is False
    assert queue.finished(10, 2.0) == [20], "it waits longest of those who are sent least"
    assert queue.finished(2, 2.0) == [4], "all three are sent one, and it waits longest"
    assert queue.finished(20, 3.0) == [12]


def test_past_the_bounds_it_is_busy_and_says_when() -> None:
    queue = UploadQueue(sends_max=1, sends_max_unfilled=1, queue_max=3, queue_per_downloader_max=2)
    assert queue.ask("a", 1, 0.0) is True
    assert queue.finished(1, 2.0) == []  # a send takes two seconds
    assert queue.ask("a", 2, 2.0) is True
    assert [queue.ask("a", ticket, 2.0) for ticket in (3, 4)] == [False, False]
    busy = queue.ask("a", 5, 2.0)
    assert isinstance(busy, Busy) and busy.queue == 2
    assert queue.ask("b", 6, 2.0) is False
    busy = queue.ask("c", 7, 2.0)
    assert isinstance(busy, Busy)
    assert busy.retry_after_seconds == 8.0  # three wait, and then it


def test_slow_readers_do_not_keep_the_link_idle() -> None:
    queue = UploadQueue(sends_max=2, sends_max_unfilled=4)
    assert queue.ask("fast", 1, 0.0) is True
    for tick in range(10):
        queue.moved(1_000_000, 0.1 * (tick + 1))
    queue.finished(1, 1.0)
    assert queue.ask("slow1", 2, 1.0) is True
    assert queue.ask("slow2", 3, 1.0) is True
    assert queue.ask("fast", 4, 1.01) is False, "the link was full a moment ago"
    assert queue.ask("other", 5, 4.0) is True, "they hardly read"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=80), st.integers(1, 4))
def test_no_ticket_is_lost_and_no_slot_is_given_twice(steps: list[tuple[bool, int]], slots: int) -> None:
    queue = UploadQueue(sends_max=slots, sends_max_unfilled=slots, queue_max=10, queue_per_downloader_max=4)
    sending: list[int] = []
    waiting: list[int] = []
    for ticket, (ask, who) in enumerate(steps):
        if ask:
            answer = queue.ask(f"d{who}", ticket, ticket / 10)
            if answer is True:
                sending.append(ticket)
            elif answer is False:
                waiting.append(ticket)
            else:
                assert len(waiting) >= 4
        elif who and sending:
            granted = queue.finished(sending.pop(who % len(sending)), ticket / 10)
            for one in granted:
                waiting.remove(one)
            sending += granted
        elif waiting:
            assert queue.finished(waiting.pop(who % len(waiting)), ticket / 10) == []
        assert len(sending) <= slots
        assert len(sending) == slots or not waiting
        declared = queue.declared(ticket / 10)
        assert (declared.sending, declared.queued) == (len(sending), len(waiting))


# ---- rates and limits ------------------------------------------------------------------------------------------


def test_a_pacer_holds_its_rate_and_shares_it_evenly() -> None:
    pacer = Pacer(1_000_000)
    free_at = {"a": 0.0, "b": 0.0}
    moved = {"a": 0, "b": 0}
    while min(free_at.values()) < 10:
        who = min(free_at, key=lambda name: free_at[name])
        now = free_at[who]
        free_at[who] = now + pacer.take(65536, now) + 1e-9
        moved[who] += 65536
    assert 0.97 <= sum(moved.values()) / 10_000_000 <= 1.05
    assert abs(moved["a"] - moved["b"]) <= 3 * 65536


def test_several_limits_hold_together_and_change_at_once() -> None:
    slow, fast = Pacer(100_000), Pacer()
    assert take_all([slow, fast], 64 * 1024, 0.0) == 0.0
    assert take_all([slow, fast], 100_000, 0.0) == 1.0
    slow.set_rate(1_000_000, 0.0)
    assert slow.take(0, 0.0) == 0.1
    slow.give_back(100_000)
    assert slow.take(0, 0.0) == 0.0
    slow.set_rate(0, 0.0)
    assert slow.take(1 << 40, 0.0) == 0.0


def test_a_rate_is_right_from_the_first_sample_and_forgets() -> None:
    rate = Rate()
    rate.busy(0.0)
    rate.add(1_000_000, 0.1)
    assert 9e6 < rate.bytes_per_second(0.1) < 11e6
    rate.idle(0.1)
    assert 9e6 < rate.bytes_per_second(100.0) < 11e6, "idle time does not count"
    rate.busy(100.0)
    for tick in range(100):
        rate.add(100_000, 100 + 0.1 * (tick + 1))
    assert 0.9e6 < rate.bytes_per_second(110.0) < 1.2e6


def test_latency_is_the_least_lately_and_delivery_the_most() -> None:
    latency = Latency()
    for seconds, now in ((0.2, 0.0), (0.05, 1.0), (0.3, 2.0)):
        latency.add(seconds, now)
    assert latency.seconds == 0.05
    latency.add(0.3, 20.0)
    assert latency.seconds == 0.3
    delivery = Delivery()
    delivery.total_bytes = 1_000_000
    delivery.sample(0, 0.0, 1.0)
    delivery.sample(0, 0.0, 2.0)
    assert delivery.bytes_per_second == 1e6
    delivery.sample(0, 0.0, 4.0)
    assert delivery.bytes_per_second == 0.25e6
