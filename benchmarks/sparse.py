"""A file far larger than memory: `python -m benchmarks.sparse [--gib 100] [--seconds 15]`.

A sparse file is shared, and fetched for a while by another peer; told are the time to share, and both peers' peak
memory beside that of the same with a file of 1 GiB. The part of a fetch is reserved as a whole, so the file that is
fetched is as large as the disk has room for, if that is less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import hosts, results
from benchmarks.contenders.contender import Work
from benchmarks.contenders.trimaran import GROUP, NAME, Trimaran, ignore
from peer.session import open_session

GIB = 1 << 30


class Vast(Trimaran):
    """Shares in `start`, timed; `go` fetches for `seconds` and lets go."""

    seconds = 15.0
    share_seconds = 0.0
    got_bytes = 0

    async def share_all(self) -> None:
        begun = time.monotonic()
        await super().share_all()
        self.share_seconds = time.monotonic() - begun

    async def get_all(self) -> list[float]:
        session = await open_session(self.settings(self.homes[1]))
        folder = self.work.folder / "leecher-0"
        folder.mkdir()
        begun = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                await session.get(
                    GROUP, NAME, folder, down_bytes_per_second=0, checksum=False, on_progress=ignore
                )
        self.got_bytes = sum(row.done_bytes for row in await session.ps())
        await session.cancel(GROUP, NAME) if self.got_bytes < self.work.size_bytes else None
        await session.close()
        return [time.monotonic() - begun]


def measure(size: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="trimaran-sparse-") as base, hosts.quiet_loopback() as host:
        source = Path(base) / "source.bin"
        with source.open("wb") as file:
            file.truncate(size)
        vast = Vast(Work(source, size, Path(base), [host], [host], host, seconds_max=seconds + 60))
        vast.seconds = seconds
        try:
            vast.start()
            run = vast.go()
            peaks = [round(process.peak_bytes() / (1 << 20), 1) for process in vast.processes[1:]]
        finally:
            vast.stop()
    row = {
        "scenario": "sparse", "gib": round(size / GIB, 1), "share_seconds": round(vast.share_seconds, 2),
        "fetched_mib": vast.got_bytes >> 20, "seeder_peak_mib": peaks[0], "leecher_peak_mib": peaks[1],
        **{name: round(value, 1) for name, value in run.notes.items()},
    }  # fmt: skip
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--keep", default="sparse")
    options = parser.parse_args()
    room = shutil.disk_usage(tempfile.gettempdir()).free * 8 // 10
    rows = [measure(min(size, room), options.seconds) for size in (GIB, options.gib * GIB)]
    if options.keep:
        results.keep(options.keep, rows, note=f"{options.gib} GiB asked for, {room >> 30} GiB had room")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
