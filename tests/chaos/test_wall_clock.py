"""The shim shifts the wall clock of a running process and leaves its sleeps and monotonic clock alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos_tests import wall_clock

CHILD = """
import sys, time
for line in sys.stdin:
    begun = time.monotonic(); time.sleep(0.05); slept = time.monotonic() - begun
    print(time.time(), slept, flush=True)
"""


def test_the_wall_clock_steps_live_and_nothing_else(tmp_path: Path) -> None:
    try:
        shim = wall_clock.build(tmp_path)
    except wall_clock.Unavailable as reason:
        pytest.skip(str(reason))
    clock = wall_clock.WallClock(shim, tmp_path / "offset")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=clock.environment,
    )  # fmt: skip
    assert child.stdin and child.stdout
    try:
        for offset in (0, 300, -300, 0):
            clock.step(offset)
            child.stdin.write("now\n")
            child.stdin.flush()
            told, slept = map(float, child.stdout.readline().split())
            assert abs(told - time.time() - offset) < 5
            assert 0.04 < slept < 5
    finally:
        child.stdin.close()
        child.wait(10)
        clock.close()
