"""What a person types on the terminal, and signals that end the waiting for it, whenever they come.

Owned here: reading a line, seen or unseen. Left to others: what is asked (`menu/asking.py`, `cli/people.py`).

`input()` and `getpass()` lose a signal that comes after Python last looked for one and before the kernel reads: its
handler is only noted, and the read waits for Enter. On an event loop, whose handlers only cancel the task, they wait
in any case. So here the read itself never waits; what waits is woken by signals too.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


def line() -> str:
    """What is typed, without the line break. Not on an event loop. Raises `EOFError`, and what the handlers of signals
    raise."""
    with _terminal() as descriptor, _woken_by_signals() as woken:
        typed = _Typed(descriptor)
        while not typed.whole:
            readable, _, _ = select.select([descriptor, woken], [], [])
            if woken in readable:
                os.read(woken, 4096)  # its handler had nothing to raise, or we were not here any more
            if descriptor in readable:
                typed.read_on()
        return typed.text


async def secret(prompt: str) -> str:
    """As `line`, but unseen, and on an event loop: cancelling ends it. The prompt goes to the terminal, wherever
    stdout and stderr go."""
    loop = asyncio.get_running_loop()
    with _terminal() as descriptor, _unseen(descriptor):
        _say(prompt)
        typed = _Typed(descriptor)
        readable = asyncio.Event()
        loop.add_reader(descriptor, readable.set)
        try:
            while not typed.whole:
                readable.clear()
                await readable.wait()
                typed.read_on()
        finally:
            loop.remove_reader(descriptor)
            _say("\n")
        return typed.text


class _Typed:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._data = b""
        self.whole = False

    def read_on(self) -> None:
        """Raises `EOFError`."""
        try:
            part = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return  # a Ctrl-C since then took the line away
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            part = b""  # the terminal is gone
        if not part and not self._data:
            raise EOFError
        self._data += part
        self.whole = not part or part.endswith(b"\n")

    @property
    def text(self) -> str:
        return os.fsdecode(self._data.removesuffix(b"\n"))


@contextmanager
def _terminal() -> Iterator[int]:
    """Opened anew, since others who have our stdin must not find that reading it no longer waits."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # the terminal is not our session's: its Ctrl-C is no signal to us
        descriptor = os.dup(sys.stdin.fileno())
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _woken_by_signals() -> Iterator[int]:
    """A descriptor that can be read once a signal came."""
    woken, signals = socket.socketpair()
    with woken, signals:
        signals.setblocking(False)
        signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        try:
            yield woken.fileno()
        finally:
            signal.set_wakeup_fd(-1)


@contextmanager
def _unseen(descriptor: int) -> Iterator[None]:
    before = termios.tcgetattr(descriptor)
    unseen = termios.tcgetattr(descriptor)
    unseen[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSAFLUSH, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


def _say(text: str) -> None:
    try:
        with open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(text)
    except OSError:
        print(text, end="", file=sys.stderr, flush=True)
