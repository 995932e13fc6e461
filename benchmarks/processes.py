"""Processes of a benchmark: started, measured from outside, and stopped by the same hand.

CPU seconds are the kernel's own count of user and system time over a process and the children it has
waited for; memory is the peak resident set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below the ephemeral range so that outgoing connections do not take them."""
    found: list[int] = []
    candidate = 20_000 + os.getpid() % 5_000
    while len(found) < count:
        candidate += 1
        if candidate > 32_000:
            candidate = 20_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", candidate))
            found.append(candidate)
    return found


class Process:
    """One child in its own process group; its output goes to a file."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.command, self.log = list(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._output = log.open("ab")
        self.child = subprocess.Popen(
            [*prefix, *command], stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.child.pid

    def cpu_seconds(self) -> float:
        """User and system time so far, this process and what it waited for."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return sum(int(field) for field in fields[11:15]) / TICKS
        return 0.0

    def peak_bytes(self) -> int:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._output.close()

    def stop(self, within_seconds: float = 10.0) -> int:
        """Ask it to end; kill it when it does not. Returns its exit code."""
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(within_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        self._output.close()
        return self.child.returncode

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def wait_until(true: Callable[[], bool], seconds: float, what: str, alive: Iterable[Process] = ()) -> float:
    """Poll until `true()`; returns the seconds it took. Raises `TimeoutError`, or `RuntimeError` when a
    process that must live has ended."""
    begun = time.monotonic()
    while not true():
        for process in alive:
            if process.child.poll() is not None:
                raise RuntimeError(f"{process.command[0]} ended while waiting for {what}:\n{process.tail()}")
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.01)
    return time.monotonic() - begun
