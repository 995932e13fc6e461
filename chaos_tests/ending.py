"""Ending a long program by a signal: what it put up is taken down, as at its own end; and ending tasks.

Owned here: SIGTERM and SIGINT. The first one cancels the program's work, whose `finally` blocks do the rest; later ones
are ignored, so that nobody's second Ctrl-C leaves trackers or namespaces behind.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterable
from types import FrameType
from typing import Any, NoReturn, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
T = TypeVar("T")


async def end(tasks: Iterable[asyncio.Task[Any]]) -> list[Exception]:
    """Cancel until they have ended; returns what they raised. Once is not enough: where a timeout is due at the same
    moment, `aiohttp` takes the cancellation for it, and the task goes on."""
    tasks = list(tasks)
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=0.2)
    raised = [None if task.cancelled() else task.exception() for task in tasks]
    return [error for error in raised if isinstance(error, Exception)]


def prepare() -> None:
    """Outside of `run`, too, a signal unwinds the program instead of ending it on the spot."""
    for number in SIGNALS:
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`; raises `SystemExit` (128 and the signal's number) when a signal ended it."""
    received: list[int] = []

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            if not received:
                task.cancel()
            received.append(number)

        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, end, number)
        return await main

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None
    finally:
        prepare()
