"""The probe of the event loop: what holds the loop shows, what only waits does not."""

from __future__ import annotations

import asyncio
import time

from cluster.loop_probe import LoopProbe


def _work(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def test_a_held_loop_shows_with_its_processor_time() -> None:
    probe = LoopProbe(0.001)
    probe.start()
    await asyncio.sleep(0.01)
    before = probe.longest()
    _work(0.2)
    await asyncio.sleep(0.01)
    wall, used = probe.longest()
    assert before[0] < 0.19 <= wall
    assert used >= 0.19
    probe.stop()


async def test_a_wait_for_the_processor_is_no_work() -> None:
    probe = LoopProbe(0.001)
    probe.start()
    await asyncio.sleep(0.01)
    time.sleep(0.2)  # as if another process had the processor
    await asyncio.sleep(0.01)
    wall, used = probe.longest()
    assert wall >= 0.19
    assert used < 0.15
    probe.stop()


async def test_what_was_long_ago_is_forgotten() -> None:
    probe = LoopProbe(0.001, window_seconds=0.05)
    probe.start()
    await asyncio.sleep(0.01)
    _work(0.2)
    await asyncio.sleep(0.01)
    assert probe.longest()[0] >= 0.19
    deadline = time.monotonic() + 10
    while probe.longest()[0] >= 0.19:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    probe.stop()
