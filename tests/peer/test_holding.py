"""Holds of the event loop: what holds it shows, whole; what only waits does not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from peer.holding import HoldingLoop, HoldingSelector, holding


def run(work: Callable[[HoldingSelector], Awaitable[None]]) -> None:
    async def with_selector() -> None:
        selector = holding()
        assert selector is not None
        await work(selector)

    with asyncio.Runner(loop_factory=HoldingLoop) as runner:
        runner.run(with_selector())


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_hold_shows_whole_and_waiting_does_not() -> None:
    async def work(selector: HoldingSelector) -> None:
        await asyncio.sleep(0.3)
        assert selector.longest_seconds < 0.2
        busy(0.25)
        await asyncio.sleep(0)  # the loop looks at its sockets again
        await asyncio.sleep(0)
        assert selector.longest_seconds >= 0.25
        time.sleep(0.5)  # waiting for something else than a processor holds the loop just the same
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert selector.longest_seconds >= 0.5
        selector.begin()
        await asyncio.sleep(0.01)
        assert selector.longest_seconds < 0.2

    run(work)


@pytest.mark.skipif(
    not Path("/proc/thread-self/schedstat").exists(), reason="the kernel tells nothing of queueing"
)
def test_waiting_for_a_processor_that_others_have_is_no_hold() -> None:
    async def work(selector: HoldingSelector) -> None:
        await asyncio.sleep(0.01)
        selector.begin()
        await asyncio.sleep(0.01)
        began = time.monotonic()
        busy(0.4)
        took = time.monotonic() - began
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0.4 <= selector.longest_seconds < 0.5 < took

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        run(work)
    finally:
        rival.kill()
        rival.wait()
        os.sched_setaffinity(0, allowed)


def test_another_loop_has_no_measure() -> None:
    async def look() -> HoldingSelector | None:
        return holding()

    assert asyncio.run(look()) is None
