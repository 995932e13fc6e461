"""Processes that the front door starts for a while: each says one line when it is ready, and is ended by us.

Owned here: starting `trimaran ...` beside us and ending it. Used by the demo and the menu. Left to others: what
is started. Everything here blocks; callers on an event loop use a thread for `wait_until_ready` and `stop`.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from peer.reports import Exit, TrimaranError

READY_SECONDS = 30.0
STOP_SECONDS = 5.0


class Started:
    """`trimaran ARGV --json`, running beside us.

    It gets none of our `TRIMARAN_...` variables but `settings`, and a session of its own, so that a Ctrl-C on
    our terminal reaches it through us alone. Its stderr goes to the file `log`.
    """

    def __init__(self, *argv: str, log: Path, settings: dict[str, str] | None = None) -> None:
        self._argv = argv
        self._log = log
        self.ready: dict[str, Any] = {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", "trimaran", *argv, "--json"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=kept | (settings or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> dict[str, Any]:
        """The line it says when it is ready. Raises `TrimaranError`; it is stopped then."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + READY_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            part = os.read(self._process.stdout.fileno(), 65536) if readable else b""
            if not part:
                break
            line += part
        try:
            self.ready = orjson.loads(line.partition(b"\n")[0])
        except orjson.JSONDecodeError:
            self.stop()
            raise TrimaranError(
                f"`trimaran {' '.join(self._argv[:2])}` did not start: {self._last_words()}",
                exit_code=Exit.UNEXPECTED,
                code="not-started",
                hint=f"Its log is {self._log}.",
            ) from None
        return self.ready

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ask it to end; make it end, with all that it started, when it does not."""
        if not self.alive:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _last_words(self) -> str:
        """What it said before it ended: its error's message when there is one."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        for line in reversed(lines):
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                return str(orjson.loads(line)["error"]["message"])
        return lines[-1] if lines else "it said nothing."


def free_base_port(first: int) -> int:
    """A port from `first` on that is free on loopback, with the two after it and the three a hundred above."""
    for base in range(first, first + 10_000, 10):
        if all(_free(base + node + apart) for node in range(3) for apart in (0, 100)):
            return base
    raise TrimaranError("No free ports were found.", exit_code=Exit.UNEXPECTED, code="no-ports")


def _free(port: int) -> bool:
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
