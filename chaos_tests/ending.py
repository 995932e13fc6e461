"""Ending a long program by a signal: what it put up is taken down, as at its own end.

Owned here: SIGTERM and SIGINT. The first one cancels the program's work, whose `finally` blocks do the rest; later ones
are ignored, so that nobody's second Ctrl-C leaves trackers or namespaces behind.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, NoReturn, TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
T = TypeVar("T")


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
