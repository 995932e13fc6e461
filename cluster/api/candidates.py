"""Which tracker to ask next: how well each one answers, which are left alone for a while, and how many
retries are allowed.

Pure: times are monotonic seconds given by the caller, chance is an injected generator. The rules:

* A node's latency is an exponentially weighted mean of its answers, and fades while it is not asked, so
  that one that was slow is tried again. The best one is preferred; within `SAME_SECONDS` of each other
  the user's order decides, so that nobody wanders between equals.
* A failure opens the node's circuit: it is asked last for a time that doubles from `OPEN_SECONDS` up to
  `OPEN_SECONDS_MAX` with each failure in a row, jittered so that clients do not return together. It is
  never struck off: when all are open, the one that reopens first is asked first.
* Retries and hedges are paid from one bucket (as in gRPC's retry throttling), which fills with time and
  with every success. An outage therefore cannot multiply the load it is caused by.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

EWMA_WEIGHT = 0.3
FADE_HALF_SECONDS = 30.0
SAME_SECONDS = 0.010
OPEN_SECONDS = 1.0
OPEN_SECONDS_MAX = 30.0
RETRY_TOKENS_MAX = 10.0
RETRY_TOKENS_PER_SECOND = 1.0
RETRY_TOKENS_PER_SUCCESS = 0.1
BACKOFF_SECONDS = 0.1
BACKOFF_SECONDS_MAX = 2.0
LEARNED_MAX = 16


@dataclass(slots=True)
class Candidate:
    url: str
    given: bool  # by the user, not learnt from an answer
    latency_seconds: float = 0.0  # 0: not measured
    measured_at: float = 0.0
    failures: int = 0  # in a row
    open_until: float = float("-inf")

    def open(self, now: float) -> bool:
        return now < self.open_until

    def latency(self, now: float) -> float:
        return self.latency_seconds * float(0.5 ** (max(0.0, now - self.measured_at) / FADE_HALF_SECONDS))

    def measure(self, seconds: float, now: float) -> None:
        before = self.latency(now)
        self.latency_seconds = before + EWMA_WEIGHT * (seconds - before) if before else seconds
        self.measured_at = now


class Candidates:
    """The trackers of one client, best first."""

    def __init__(self, urls: Iterable[str], chance: random.Random) -> None:
        self._chance = chance
        self._by_url = {url: Candidate(url, given=True) for url in urls}

    def urls(self) -> list[str]:
        return list(self._by_url)

    def learn(self, urls: Iterable[str]) -> None:
        """Add nodes the cluster spoke of, after those the user named; forget those it no longer names."""
        named = list(dict.fromkeys(urls))[:LEARNED_MAX]
        for url in [c.url for c in self._by_url.values() if not c.given and c.url not in named]:
            del self._by_url[url]
        for url in named:
            self._by_url.setdefault(url, Candidate(url, given=False))

    def ranked(self, now: float) -> list[str]:
        """All of them, each once, in the order to be asked."""
        shut = [c for c in self._by_url.values() if not c.open(now)]
        open_ = sorted((c for c in self._by_url.values() if c.open(now)), key=lambda c: c.open_until)
        # Not yet measured counts as good: it is tried in its turn, and what the user wrote first goes first.
        best = min((c.latency(now) for c in shut), default=0.0)

        def order(candidate: Candidate) -> tuple[bool, float]:
            latency = candidate.latency(now)
            return (not candidate.given, 0.0 if latency <= best + SAME_SECONDS else latency)

        return [c.url for c in sorted(shut, key=order)] + [c.url for c in open_]

    def expected_seconds(self, url: str, now: float) -> float:
        """0 when nothing is known."""
        candidate = self._by_url.get(url)
        return candidate.latency(now) if candidate else 0.0

    def answered(self, url: str, seconds: float | None, now: float) -> None:
        """It did its work. `seconds` is None for verbs whose time says nothing about the node."""
        if (candidate := self._by_url.get(url)) is not None:
            candidate.failures = 0
            candidate.open_until = float("-inf")
            if seconds is not None:
                candidate.measure(seconds, now)

    def overtaken(self, url: str, seconds: float, now: float) -> None:
        """Another one answered first although this one was asked earlier: it takes at least that long."""
        candidate = self._by_url.get(url)
        if candidate is not None and seconds > candidate.latency(now):
            candidate.measure(seconds, now)

    def failed(self, url: str, now: float) -> bool:
        """Leave it alone for a while. True when it had worked until now (worth a line in the log)."""
        if (candidate := self._by_url.get(url)) is None:
            return False
        candidate.failures += 1
        pause = min(OPEN_SECONDS * 2 ** (candidate.failures - 1), OPEN_SECONDS_MAX)
        candidate.open_until = now + pause * self._chance.uniform(0.75, 1.25)
        return candidate.failures == 1


class RetryBudget:
    """A token bucket for everything that is asked more than once."""

    def __init__(self, now: float) -> None:
        self._tokens = RETRY_TOKENS_MAX
        self._at = now

    def _fill(self, now: float) -> None:
        grown = self._tokens + max(0.0, now - self._at) * RETRY_TOKENS_PER_SECOND
        self._tokens, self._at = min(RETRY_TOKENS_MAX, grown), now

    def success(self) -> None:
        self._tokens = min(RETRY_TOKENS_MAX, self._tokens + RETRY_TOKENS_PER_SUCCESS)

    def take(self, now: float) -> bool:
        self._fill(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def wait_seconds(self, now: float) -> float:
        """Until a token is there."""
        self._fill(now)
        return max(0.0, (1.0 - self._tokens) / RETRY_TOKENS_PER_SECOND)


def backoff_seconds(rounds: int, chance: random.Random) -> float:
    """After the given number of rounds in which nobody could answer; jittered by half."""
    bound: float = min(BACKOFF_SECONDS * 2 ** min(rounds - 1, 10), BACKOFF_SECONDS_MAX)
    return bound * chance.uniform(0.5, 1.0)
