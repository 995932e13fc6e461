"""One call, several trackers: who is asked, when the next one is asked too, and when to stop.

Owned here: the life of a call from its first attempt to its one end. Left to others: one HTTP exchange
(`exchange.py`), the order of the trackers and the retry budget (`candidates.py`), what is asked
(`client.py`).

A call goes round the trackers, best first. A tracker that refuses to work now (no leader, overloaded),
cannot be reached or breaks off is passed over at once; one that is merely silent is kept waiting while
the next is asked as well (a hedge), and the first answer wins. After a round without an answer there is
a jittered, growing pause. Everything beyond the first attempt is paid from the retry budget.

Every attempt of a write carries the same idempotency key, so asking twice cannot do it twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .candidates import Candidates, RetryBudget, backoff_seconds
from .errors import ApiProblem, TrackerError, Unavailable, UnknownOutcome
from .exchange import Answered, End, Exchange, Failed, Refused, Request

_log = logging.getLogger("trimaran.trackers")

CONNECT_SECONDS = 0.5
CONNECT_SECONDS_MAX = 5.0
ATTEMPT_SECONDS = 6.0
HEDGE_SECONDS_MIN = 0.15
HEDGE_SECONDS_MAX = 0.7
HEDGE_FACTOR = 4.0
"""A hedge is sent when an answer is this many times as late as usual, within the two bounds above."""


@dataclass(slots=True)
class _Call:
    request: Request
    ends_at: float
    attempts: int = 0
    rounds: int = 0
    indefinite: bool = False
    retry_after_seconds: float = 0.0
    failures: dict[str, Failed] = field(default_factory=dict)  # the latest of each tracker

    def note(self, url: str, end: Failed) -> None:
        self.failures[url] = end
        self.indefinite |= end.indefinite and self.request.changes_something
        if end.retry_after_seconds is not None:
            self.retry_after_seconds = max(self.retry_after_seconds, end.retry_after_seconds)


@dataclass(frozen=True, slots=True)
class _Attempt:
    url: str
    started_at: float


class Failover:
    def __init__(
        self,
        exchange: Exchange,
        candidates: Candidates,
        *,
        clock: Callable[[], float],
        chance: random.Random,
    ) -> None:
        self._exchange = exchange
        self.candidates = candidates
        self._clock = clock
        self._chance = chance
        self.budget = RetryBudget(clock())

    async def call(self, request: Request, deadline_seconds: float) -> object:
        """The decoded answer. Raises a `TrackerError` at the deadline at the latest."""
        call = _Call(request, self._clock() + deadline_seconds)
        while True:
            call.rounds += 1
            answer = await self._round(call)
            if answer is not None:
                return answer.value
            pause = max(backoff_seconds(call.rounds, self._chance), call.retry_after_seconds)
            call.retry_after_seconds = 0.0
            if self._hopeless(call) or self._clock() + pause >= call.ends_at:
                raise self._ended(call)
            await asyncio.sleep(pause)

    async def _round(self, call: _Call) -> Answered | None:
        """Ask each tracker once. None when none could answer."""
        waiting = deque(self.candidates.ranked(self._clock()))
        running: dict[asyncio.Task[End], _Attempt] = {}
        try:
            while waiting or running:
                now = self._clock()
                if now >= call.ends_at:
                    break
                if waiting and not running and not await self._affordable(call):
                    break
                if waiting and (not running or self.budget.take(now)):
                    url = waiting.popleft()
                    running[self._start(call, url)] = _Attempt(url, now)
                done, _ = await asyncio.wait(
                    running,
                    timeout=self._patience(call, running, more=bool(waiting)),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    attempt = running.pop(task)
                    end = self._weigh(call, attempt, task.result(), others=bool(running))
                    if end is not None:
                        self._overtake(running)
                        return end
                if call.indefinite and not call.request.repeatable:
                    break
            # What still runs when the time is up has left, and will not be heard of.
            call.indefinite |= bool(running) and call.request.changes_something
            return None
        finally:
            await _cancel(running)

    def _start(self, call: _Call, url: str) -> asyncio.Task[End]:
        call.attempts += 1
        left = call.ends_at - self._clock()
        # A machine too busy to shake hands in time is not dead: later rounds wait longer.
        connect = min(CONNECT_SECONDS * 2 ** (call.rounds - 1), CONNECT_SECONDS_MAX)
        total = min(ATTEMPT_SECONDS, left) if call.request.repeatable else left
        return asyncio.create_task(
            self._exchange.perform(url, call.request, connect_seconds=connect, total_seconds=total)
        )

    async def _affordable(self, call: _Call) -> bool:
        """The first attempt is free; the others wait for the budget. False when time runs out."""
        while call.attempts and not self.budget.take(now := self._clock()):
            wait = self.budget.wait_seconds(now) * self._chance.uniform(1.0, 1.25)
            if now + wait >= call.ends_at:
                return False
            await asyncio.sleep(wait)
        return True

    def _patience(self, call: _Call, running: dict[asyncio.Task[End], _Attempt], *, more: bool) -> float:
        """How long to wait for those asked before one more is asked."""
        now = self._clock()
        left = max(0.0, call.ends_at - now)
        if not more or not call.request.repeatable:
            return left
        if call.request.slow:
            return min(left, HEDGE_SECONDS_MAX)
        latest = max(running.values(), key=lambda attempt: attempt.started_at)
        usual = self.candidates.expected_seconds(latest.url, now) * HEDGE_FACTOR
        return min(left, max(HEDGE_SECONDS_MIN, min(usual or HEDGE_SECONDS_MAX, HEDGE_SECONDS_MAX)))

    def _weigh(self, call: _Call, attempt: _Attempt, end: End, *, others: bool) -> Answered | None:
        """Learn from an attempt's end. Returns the answer; raises a refusal that is final. `others`:
        further attempts are under way."""
        now = self._clock()
        if isinstance(end, Answered | Refused):
            seconds = None if call.request.slow else now - attempt.started_at
            self.candidates.answered(attempt.url, seconds, now)
            self.budget.success()
        if isinstance(end, Answered):
            return end
        if isinstance(end, Refused):
            underway = others and call.request.changes_something
            if (call.indefinite or underway) and not end.replicated:
                raise self._unknown(call, end.problem.detail or end.problem.title)
            raise ApiProblem(end.problem)
        call.note(attempt.url, end)
        if self.candidates.failed(attempt.url, now):
            _log.info("tracker %s is passed over: %s", attempt.url, end.message)
        return None

    def _overtake(self, running: dict[asyncio.Task[End], _Attempt]) -> None:
        now = self._clock()
        for attempt in running.values():
            self.candidates.overtaken(attempt.url, now - attempt.started_at, now)

    def _hopeless(self, call: _Call) -> bool:
        if call.indefinite and not call.request.repeatable:
            return True
        return bool(call.failures) and all(end.permanent for end in call.failures.values())

    def _ended(self, call: _Call) -> TrackerError:
        reasons = "; ".join(f"{url}: {end.message}" for url, end in call.failures.items())
        if call.indefinite:
            return self._unknown(call, reasons or "no answer came in time")
        first = next(iter(call.failures.values()), None)
        if first is not None and all(end.permanent for end in call.failures.values()):
            if first.problem is not None:
                return ApiProblem(first.problem)
            return Unavailable(f"no tracker can be used: {reasons}", code=first.code, hint=first.hint)
        hint = next((end.hint for end in call.failures.values() if end.hint), "")
        return Unavailable(
            f"no tracker could answer: {reasons or 'no answer came in time'}",
            hint=hint or "nothing was changed; see `trimaran cluster status`, and try again",
        )

    def _unknown(self, call: _Call, reason: str) -> UnknownOutcome:
        if call.request.idempotency_key:
            hint = "it may have taken effect; repeating it with the same idempotency key cannot do it twice"
        else:
            hint = "it may have taken effect; look before trying again"
        return UnknownOutcome(
            f"the trackers could not say whether it was done: {reason}",
            idempotency_key=call.request.idempotency_key,
            hint=hint,
        )


async def _cancel(running: dict[asyncio.Task[End], _Attempt]) -> None:
    for task in running:
        task.cancel()
    if running:
        await asyncio.gather(*running, return_exceptions=True)
