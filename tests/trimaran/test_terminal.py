"""Questions on a real terminal: no signal is lost, whenever it comes."""

from __future__ import annotations

import os
import pty
import sys

import pytest

INTERRUPTED = """
import asyncio, random, signal, sys, time
from trimaran.terminal import line, secret

AGAIN_SECONDS = 10.0  # a signal that was lost is followed by another, so that the loss is seen
moments = random.Random(1)

def soon():
    signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-6, 400e-6), AGAIN_SECONDS)

def interrupt(number, frame):
    raise KeyboardInterrupt

def seen():
    signal.signal(signal.SIGALRM, interrupt)
    soon()
    line()

async def unseen():
    asyncio.get_running_loop().add_signal_handler(signal.SIGALRM, asyncio.current_task().cancel)
    soon()
    await secret("")

for number in range(int(sys.argv[2])):
    begin = time.monotonic()
    try:
        seen() if sys.argv[1] == "seen" else asyncio.run(unseen())
    except (KeyboardInterrupt, asyncio.CancelledError):
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.monotonic() - begin > AGAIN_SECONDS / 2:
        sys.exit(f"the signal of question {number} was lost")
print("none was lost")
"""

TYPED = """
import asyncio
from trimaran.terminal import line, secret

print(repr(line()))
print(repr(asyncio.run(secret("Unseen: "))))
"""


class Terminal:
    """A Python program on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        pid, self._descriptor = pty.fork()
        if pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", *argv])
        self._pid = pid
        self.shown = b""

    def until(self, text: bytes) -> None:
        while text not in self.shown:
            self.shown += os.read(self._descriptor, 65536)

    def type(self, data: bytes) -> None:
        os.write(self._descriptor, data)

    def ended(self) -> int:
        try:
            while part := os.read(self._descriptor, 65536):
                self.shown += part
        except OSError:
            pass  # EIO: the other side is gone
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


@pytest.mark.parametrize(("how", "times"), [("seen", 2000), ("unseen", 700)])
def test_no_signal_is_lost_whenever_it_comes(how: str, times: int) -> None:
    asked = Terminal(INTERRUPTED, how, str(times))
    assert asked.ended() == 0, asked.shown[-500:].decode()
    assert asked.shown.endswith(b"none was lost\r\n"), asked.shown[-500:].decode()


def test_what_is_typed_is_read_and_a_secret_is_not_shown() -> None:
    asked = Terminal(TYPED)
    asked.type("naïve\n".encode())
    asked.until(b"'na\xc3\xafve'")
    asked.until(b"Unseen: ")
    asked.type(b"hush")
    asked.type(b"\x04ed\n")  # Ctrl-D hands over what is typed so far, and ends nothing
    asked.until(b"'hushed'")
    assert asked.ended() == 0
    assert asked.shown.count(b"hush") == 1, asked.shown


def test_the_end_of_input_is_an_end() -> None:
    asked = Terminal(TYPED)
    asked.type(b"\x04")
    assert asked.ended() == 1
    assert b"EOFError" in asked.shown
