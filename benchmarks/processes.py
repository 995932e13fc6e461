"""Processes of a benchmark: started, measured from outside, and stopped by the same hand.

CPU seconds are the kernel's own count of user and system time over a process and the children it has
waited for; memory is the peak resident set.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

_candidates = itertools.cycle(range(20_000 + os.getpid() % 5_000, 32_000))
TICKS = os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below the ephemeral range so that outgoing connections do not take them; each
    is given once."""
    found: list[int] = []
    while len(found) < count:
        candidate = next(_candidates)
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

    def _session(self) -> list[tuple[int, list[str]]]:
        """Every living process of its session, as (pid, the fields of its stat after the name)."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    fields = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.pid or int(entry.name) == self.pid:
                        found.append((int(entry.name), fields))
        return found

    def cpu_seconds(self) -> float:
        """User and system time so far, of it, its living children, and those they waited for."""
        return sum(int(field) for _, fields in self._session() for field in fields[11:15]) / TICKS

    def peak_bytes(self) -> int:
        """The peak resident set of the largest of them."""
        peak = 0
        for pid, _ in self._session():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peak = max(peak, int(line.split()[1]) * 1024)
        return peak

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
