"""A long program that is told to end takes down what it put up: processes, folders, network namespaces."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from chaos_tests import ending

ROOT = Path(__file__).parents[2]
PROGRAM = """
import asyncio
from chaos_tests import ending
async def main():
    try:
        print("up", flush=True)
        await asyncio.sleep(60)
    finally:
        print("ending", flush=True)
        await asyncio.sleep(0.5)
        print("tidy", flush=True)
ending.run(main())
"""


def test_a_signal_ends_it_once_and_repeated_ones_do_not_disturb_the_tidying() -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    program.send_signal(signal.SIGTERM)
    assert program.stdout.readline() == "ending\n"
    program.send_signal(signal.SIGTERM)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=20)[0] == "tidy\n"
    assert program.returncode == 128 + signal.SIGTERM


def processes_of(mark: str) -> list[str]:
    """Command lines of living processes that name `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if mark in line:
                found.append(line)
    return found


def within(seconds: float, true: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_the_live_scenarios_leave_nothing_behind(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "chaos_tests.live", "--only", "leaves", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert within(
            40, lambda: any(b'"nodes"' in log.read_bytes() for log in tmp_path.glob("*/trackers.log"))
        )
        assert processes_of(str(tmp_path / "trimaran-live"))
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 128 + signal.SIGTERM
        assert within(5, lambda: not processes_of(str(tmp_path / "trimaran-live")))
        assert not list(tmp_path.glob("trimaran-live-*"))
        spaces = Path("/run/netns")
        left = [each.name for each in spaces.iterdir()] if spaces.exists() else []
        assert not [name for name in left if name.startswith(f"tb{program.pid % 10_000}")]
    finally:
        program.kill()
        program.wait()


async def test_a_task_that_takes_a_cancellation_for_something_else_is_ended_all_the_same() -> None:
    taken = 0

    async def stubborn() -> None:
        nonlocal taken
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                taken += 1
                if taken == 3:
                    raise

    async def broken() -> None:
        raise ValueError("in the rig itself")

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    raised = await asyncio.wait_for(ending.end(tasks), 10)
    assert [str(error) for error in raised] == ["in the rig itself"]
    assert taken == 3
