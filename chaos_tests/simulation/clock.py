"""Virtual time: one queue of events for the whole simulated world, and each process's view of it.

Owned here: order. Events of equal time run in the order they were scheduled, so that a seed fixes everything.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

from cluster.raft.disk import Syncer


class Event:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self._queue: list[tuple[float, int, Event]] = []
        self._count = 0

    def at(self, time: float, callback: Callable[[], None]) -> Event:
        event = Event(callback)
        self._count += 1
        heapq.heappush(self._queue, (max(time, self.now), self._count, event))
        return event

    def later(self, seconds: float, callback: Callable[[], None]) -> Event:
        return self.at(self.now + seconds, callback)

    def run_until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            time, _, event = heapq.heappop(self._queue)
            if not event.cancelled:
                self.now = time
                self.steps += 1
                event.callback()
        self.now = max(self.now, end)


class ProcessRuntime:
    """`Runtime` for one simulated process. When the process dies its calls die with it; while it is paused they
    wait. Its clock starts anywhere, as monotonic clocks do, and a call takes a little time, so that loops which
    look at the clock end."""

    def __init__(self, clock: Clock, seed: random.Random, syncer: Syncer) -> None:
        self.random = random.Random(seed.getrandbits(64))
        self.syncer = syncer
        self.alive = True
        self.paused = False
        self.around: Callable[[Callable[[], None]], None] = lambda callback: callback()
        self._clock = clock
        self._offset = self.random.uniform(10, 10_000)
        self._spent = 0.0
        self._held: list[Event] = []

    def now(self) -> float:
        self._spent += 2e-6
        return self._offset + self._clock.now + self._spent

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Event:
        return self._schedule(max(0.0, seconds), callback)

    def call_soon(self, callback: Callable[[], None]) -> Event:
        return self._schedule(0.0, callback)

    def _schedule(self, seconds: float, callback: Callable[[], None]) -> Event:
        inner = Event(callback)
        self._clock.later(seconds, lambda: self.run(inner))
        return inner

    def run(self, event: Event) -> None:
        if event.cancelled or not self.alive:
            return
        if self.paused:
            self._held.append(event)
            return
        self.around(event.callback)

    def resume(self) -> None:
        self.paused = False
        held, self._held = self._held, []
        for event in held:
            self._clock.later(0.0, lambda event=event: self.run(event))  # type: ignore[misc]
