"""Steps of a process's wall clock, live, by a preloaded shim (libfaketime breaks `time.sleep` on 3.11)."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "shim" / "wall_clock.c"


class Unavailable(Exception):
    """There is no C compiler here; the fault is skipped, and the run says so."""


def build(folder: Path) -> Path:
    """Compile the shim into `folder`. Raises `Unavailable`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler (cc): wall clock steps are skipped")
    target = folder / "wall_clock.so"
    if not target.exists():
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(target), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"the clock shim does not compile: {done.stderr.strip()[:200]}")
    return target


class WallClock:
    """The offset of one process's wall clock, shared with it through a mapped file."""

    def __init__(self, shim: Path, file: Path) -> None:
        file.write_bytes(bytes(mmap.PAGESIZE))
        self._handle = file.open("r+b")
        self._page = mmap.mmap(self._handle.fileno(), mmap.PAGESIZE)
        self.environment = {"LD_PRELOAD": str(shim), "TRIMARAN_RIG_WALL_CLOCK": str(file)}

    def step(self, seconds: float) -> None:
        """Set the offset to `seconds` from true time."""
        self._page[:8] = struct.pack("<q", int(seconds * 1e9))

    def close(self) -> None:
        self._page.close()
        self._handle.close()
