"""The order of trackers and the retry budget, with a clock that stands where the test puts it."""

from __future__ import annotations

import random
import uuid

from hypothesis import given
from hypothesis import strategies as st

from cluster.api import candidates
from cluster.api.candidates import Candidates, RetryBudget, backoff_seconds
from cluster.api.client import TrackerClient
from cluster.api.idempotency import new_key
from cluster.api.routes import ROUTES

URLS = ["a", "b", "c"]


@given(st.lists(st.tuples(st.sampled_from([*URLS, "d"]), st.booleans(), st.floats(0.001, 2)), max_size=40))
def test_every_tracker_is_always_in_the_order_once(happenings: list[tuple[str, bool, float]]) -> None:
    nodes = Candidates(URLS, random.Random(0))
    now = 0.0
    for url, good, seconds in happenings:
        now += seconds
        if good:
            nodes.answered(url, seconds, now)
        else:
            nodes.failed(url, now)
        assert sorted(nodes.ranked(now)) == URLS


def test_the_one_that_failed_is_last_and_comes_back() -> None:
    nodes = Candidates(URLS, random.Random(0))
    assert nodes.failed("a", 10.0), "the first failure is worth a line"
    assert not nodes.failed("a", 10.1)
    assert nodes.ranked(10.2) == ["b", "c", "a"]
    assert nodes.ranked(10.2 + candidates.OPEN_SECONDS * 4) == ["a", "b", "c"]


def test_pauses_grow_to_a_bound() -> None:
    nodes = Candidates(["a"], random.Random(0))
    for _ in range(40):
        nodes.failed("a", 0.0)
    assert nodes._by_url["a"].open_until <= candidates.OPEN_SECONDS_MAX * 1.25


def test_latency_decides_and_fades() -> None:
    nodes = Candidates(URLS, random.Random(0))
    nodes.answered("a", 0.5, 0.0)
    nodes.answered("b", 0.002, 0.0)
    nodes.answered("c", 0.004, 0.0)
    assert nodes.ranked(0.0) == ["b", "c", "a"], "near equals keep the user's order"
    assert nodes.ranked(600.0) == ["a", "b", "c"], "what was slow long ago is tried again"


def test_learnt_trackers_stand_behind_and_are_bounded() -> None:
    nodes = Candidates(["a"], random.Random(0))
    nodes.answered("a", 1.0, 0.0)
    nodes.learn(["a", "x", "y"])
    assert nodes.ranked(0.0) == ["a", "x", "y"]
    nodes.learn([f"n{number}" for number in range(1000)])
    assert len(nodes.urls()) <= 1 + candidates.LEARNED_MAX
    nodes.learn([])
    assert nodes.urls() == ["a"]


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=200))
def test_the_budget_never_gives_more_than_it_has(steps: list[float]) -> None:
    budget, now, taken = RetryBudget(0.0), 0.0, 0
    for step in steps:
        now += step
        taken += budget.take(now)
        assert taken <= candidates.RETRY_TOKENS_MAX + now * candidates.RETRY_TOKENS_PER_SECOND + 1e-6
        if (wait := budget.wait_seconds(now)) > 0:
            assert RetryBudget.take(budget, now + wait + 1e-6)
            now, taken = now + wait + 1e-6, taken + 1


@given(st.integers(1, 100), st.integers())
def test_backoff_is_bounded_and_jittered(rounds: int, seed: int) -> None:
    assert 0.05 <= backoff_seconds(rounds, random.Random(seed)) <= candidates.BACKOFF_SECONDS_MAX


@given(st.integers(0, 2**48 - 1))
def test_keys_are_version_7_and_carry_the_time(milliseconds: int) -> None:
    key = uuid.UUID(new_key(wall_milliseconds=lambda: milliseconds))
    assert key.version == 7
    assert key.variant == uuid.RFC_4122
    assert key.int >> 80 == milliseconds


def test_each_route_has_its_method() -> None:
    assert [route.name for route in ROUTES if not hasattr(TrackerClient, route.name)] == []
