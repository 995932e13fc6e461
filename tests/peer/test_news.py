"""Who is told what of new pieces, and when."""

from __future__ import annotations

import random

from peer.bitmap import full_mask, without
from peer.news import (
    CONFIRM_SECONDS,
    LATER_SECONDS_MAX,
    SOON_SECONDS,
    SOON_SECONDS_PER_LINK,
    STOCK_PIECES,
    News,
)

SOON = SOON_SECONDS + 2 * SOON_SECONDS_PER_LINK


def test_one_who_is_about_to_run_out_is_told_soon_and_others_later() -> None:
    stock = full_mask(STOCK_PIECES)
    news = News(100, stock)
    news.linked("rich", have=0, told=stock, now=0.0)
    news.linked("poor", have=1, told=stock, now=0.0)
    assert news.wake_at is None
    news.gained(1 << 10, 2.0)
    assert news.wake_at is not None
    assert 2.0 < news.wake_at <= 2.0 + SOON
    news.gained(1 << 11, 2.001)
    assert news.due(2.0) == []
    assert news.due(2.0 + SOON) == [(0b11 << 10, ["poor"])]
    assert news.wake_at == 2.0 + LATER_SECONDS_MAX
    news.gained(1 << 12, 2.1)
    assert (0b111 << 10, ["rich"]) in news.due(2.0 + LATER_SECONDS_MAX)


def test_the_nearer_the_end_of_one_the_sooner_it_is_told() -> None:
    stock = full_mask(STOCK_PIECES)
    delays = []
    for held in (10, 50, 90, 97):
        news = News(100, stock)
        news.linked("other", have=0, told=stock, now=0.0)
        news.heard("other", full_mask(held) << STOCK_PIECES, 1.0 * held)  # one each second
        news.gained(1 << 99, 1.0 * held)
        assert news.wake_at is not None
        delays.append(news.wake_at - held)
    assert delays == sorted(delays, reverse=True)
    assert delays[0] == LATER_SECONDS_MAX
    assert delays[-1] < LATER_SECONDS_MAX / 2


def test_one_who_has_it_is_told_when_there_is_something_it_lacks_or_we_are_whole() -> None:
    news = News(4, 0)
    news.linked("other", have=0b0011, told=0, now=0.0)
    news.gained(0b0001, 0.0)
    news.gained(0b0010, 0.0)
    assert news.wake_at is None
    news.gained(0b0100, 1.0)
    assert news.due(1.0 + SOON) == [(0b0111, ["other"])]
    news.heard("other", 0b1000, 2.0)
    news.gained(0b1000, 3.0)
    assert news.due(3.0) == [(0b1000, ["other"])]
    assert news.wake_at is None


def test_a_seeder_hears_in_time_that_what_it_sent_arrived() -> None:
    news = News(100, 0)
    news.linked("seeder", have=full_mask(100), told=0, now=0.0)
    for index in range(50):
        news.gained(1 << index, index / 100)
    assert news.due(CONFIRM_SECONDS) == [(full_mask(50), ["seeder"])]


def test_what_was_lost_and_comes_back_is_told_again() -> None:
    news = News(10, 0b111)
    news.linked("other", have=0, told=0b111, now=0.0)
    news.lost(0b010)
    assert news.due(10.0) == []
    news.gained(0b010, 11.0)
    assert news.due(12.0) == [(0b010, ["other"])]
    news.unlinked("other")
    news.gained(0b1000, 13.0)
    assert news.due(20.0) == []


def test_in_the_end_everybody_was_told_everything_once() -> None:
    rng = random.Random(7)
    news = News(200, 0)
    told: dict[str, int] = {f"p{number}": 0 for number in range(10)}
    for peer in told:
        news.linked(peer, rng.getrandbits(200), 0, 0.0)
    now, missing = 0.0, full_mask(200)
    while missing or news.wake_at is not None:
        if missing and (news.wake_at is None or rng.random() < 0.5):
            now += 0.01
            index = rng.choice([index for index in range(200) if missing >> index & 1])
            missing = without(missing, 1 << index)
            news.gained(1 << index, now)
        else:
            now = max(now, news.wake_at or 0.0)
        for pieces, peers in news.due(now):
            for peer in peers:
                assert not told[peer] & pieces, "told twice"
                assert not pieces & missing, "told of what is not here"
                told[peer] |= pieces
    assert set(told.values()) == {full_mask(200)}
