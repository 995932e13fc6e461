"""Moving bytes, side by side with the programs people use today, in one run, alternating.

    python -m benchmarks.swarm [--full] [--only SCENARIO,...] [--contenders NAME,...] [--rounds N] [--scale S]

Each round runs every contender once; medians are given. `--scale` shrinks the sizes (1 is the stated size).
Scenarios that this machine cannot give (no root, a missing program) are skipped with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hosts, results
from benchmarks.contenders.aria2 import Aria2, Aria2Metalink
from benchmarks.contenders.bittorrent import Libtorrent
from benchmarks.contenders.contender import Contender, Distance, Run, Work
from benchmarks.contenders.limit import Limit
from benchmarks.contenders.one_by_one import CurlOneByOne, RsyncOneByOne, TrimaranOneByOne
from benchmarks.contenders.rsync import Rsync
from benchmarks.contenders.trimaran import Trimaran, TrimaranBlake3, TrimaranTls
from benchmarks.contenders.web import Curl
from benchmarks.hosts import Host

MIB = 1 << 20
Place = Callable[[], AbstractContextManager[tuple[list[Host], list[Host], Host]]]


@dataclass(frozen=True)
class Scenario:
    name: str
    what: str
    size_bytes: int
    place: Place  # seeders, leechers, the trackers' host
    contenders: tuple[type[Contender], ...]
    files: int = 1
    bound_seconds: Callable[[int], float] | None = None  # of the fluid model, from the size
    full_only: bool = False
    distance: Distance | None = None


def loopback(leechers: int) -> Place:
    @contextmanager
    def place() -> Iterator[tuple[list[Host], list[Host], Host]]:
        with hosts.quiet_loopback() as host:
            yield [host], [host] * leechers, host

    return place


def limited(seeders: list[int], leechers: list[int]) -> Place:
    @contextmanager
    def place() -> Iterator[tuple[list[Host], list[Host], Host]]:
        with hosts.limited([*seeders, *leechers]) as (all_hosts, bridge):
            yield all_hosts[: len(seeders)], all_hosts[len(seeders) :], bridge

    return place


def bound(seeders: list[int], leechers: list[int]) -> Callable[[int], float]:
    """Kumar and Ross, "Peer-Assisted File Distribution: The Minimum Distribution Time" (2006), downloads
    unlimited."""
    return lambda size: max(size / sum(seeders), len(leechers) * size / (sum(seeders) + sum(leechers)))


def one_to_many(count: int, rate: int) -> tuple[Place, Callable[[int], float]]:
    return limited([rate], [rate] * count), bound([rate], [rate] * count)


_EIGHT, _EIGHT_BOUND = one_to_many(8, 20_000_000)
_CROWD, _CROWD_BOUND = one_to_many(32, 5_000_000)
_UNEQUAL = [2_000_000, 8_000_000, 32_000_000]

SCENARIOS = (
    Scenario("one-to-one", "1 GiB, CPU-bound, loopback", 1024 * MIB, loopback(1),
             (Trimaran, TrimaranBlake3, TrimaranTls, Libtorrent, Aria2, Aria2Metalink, Curl, Limit)),
    Scenario("one-to-eight", "256 MiB to eight, CPU-bound, loopback", 256 * MIB, loopback(8),
             (Trimaran, TrimaranBlake3, Libtorrent, Aria2)),
    Scenario("one-to-eight-limited", "128 MiB to eight, 20 MB/s of upload each", 128 * MIB, _EIGHT,
             (Trimaran, Libtorrent, Aria2), bound_seconds=_EIGHT_BOUND),
    Scenario("unequal-seeders", "256 MiB from seeders of 2, 8 and 32 MB/s", 256 * MIB, limited(_UNEQUAL, [0]),
             (Trimaran, Libtorrent), bound_seconds=lambda size: size / sum(_UNEQUAL)),
    Scenario("flash-crowd", "32 MiB to 32, one seeder, 5 MB/s of upload each", 32 * MIB, _CROWD,
             (Trimaran, Libtorrent), bound_seconds=_CROWD_BOUND, full_only=True),
    Scenario("far", "128 MiB over 100 Mbit/s and 100 ms there and back", 128 * MIB, loopback(1), (Trimaran, Libtorrent),
             bound_seconds=lambda size: size / 12.5e6, distance=Distance(0.1, 12_500_000)),
    Scenario("near", "512 MiB over 1 Gbit/s and 20 ms there and back", 512 * MIB, loopback(1), (Trimaran, Libtorrent),
             bound_seconds=lambda size: size / 125e6, distance=Distance(0.02, 125_000_000)),
    Scenario("one-by-one", "200 files of 1 to 200 KiB, each shared and fetched by itself", 20 * MIB, loopback(1),
             (TrimaranOneByOne, CurlOneByOne, RsyncOneByOne), files=200),
    Scenario("folder", "10,000 files of 1 to 200 KiB, to a fresh target", 1000 * MIB, loopback(1),
             (Trimaran, Rsync, Aria2, Libtorrent), files=10_000),
)  # fmt: skip


def make_source(scenario: Scenario, folder: Path, scale: float) -> tuple[Path, int]:
    """Random bytes, so that nothing compresses or repeats; returns the path and the size."""
    chance = random.Random(scenario.name)
    if scenario.files == 1:
        path = folder / "source.bin"
        size = int(scenario.size_bytes * scale)
        with path.open("wb") as file:
            for start in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - start)))
        return path, size
    path, size = folder / "source", 0
    for number in range(int(scenario.files * scale)):
        length = chance.randint(1 << 10, 200 << 10)
        place = path / f"{number % 100:02d}" / f"{number:05d}.bin"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.urandom(length))
        size += length
    return path, size


def same(source: Path, target: Path) -> bool:
    if source.is_file():
        return target.is_file() and filecmp.cmp(source, target, shallow=False)
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    found = {
        path.relative_to(target) for path in target.rglob("*") if path.is_file() and path.name != ".done"
    }
    return wanted == found and all(
        filecmp.cmp(source / path, target / path, shallow=False) for path in wanted
    )


def warm_memory(size_bytes: int = 3 << 30) -> None:
    """Touch free memory right before a timed run: on virtual machines it goes back to the host within
    seconds, and touching it again costs seconds per GB."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with mmap.mmap(-1, min(size_bytes, free // 2), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def run_once(kind: type[Contender], work: Work, check: bool) -> Run:
    contender = kind(work)
    try:
        contender.start()
        warm_memory()
        run = contender.go()
        if check and not all(same(work.source, target) for target in contender.targets()):
            raise RuntimeError(f"{kind.name} delivered other bytes than the source's")
        return run
    finally:
        contender.stop()


def run_scenario(
    scenario: Scenario, kinds: list[type[Contender]], rounds: int, scale: float, base: Path
) -> list[dict[str, Any]]:
    samples: dict[str, list[Run]] = {kind.name: [] for kind in kinds}
    failures: dict[str, str] = {}
    source_folder = base / "source"
    source_folder.mkdir()
    source, size = make_source(scenario, source_folder, scale)
    with scenario.place() as (seeders, leechers, tracker):
        for round_number in range(rounds):
            for kind in kinds:
                if kind.name in failures:
                    continue
                folder = base / f"{round_number}-{kind.name.replace(' ', '-')}"
                folder.mkdir()
                work = Work(source, size, folder, seeders, leechers, tracker, distance=scenario.distance)
                try:
                    samples[kind.name].append(run_once(kind, work, check=round_number == 0))
                except (RuntimeError, TimeoutError, OSError) as error:
                    failures[kind.name] = str(error)
                    print(f"{scenario.name}: {kind.name} failed: {error}", file=sys.stderr)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
        moved = size * len(leechers)
    shutil.rmtree(source_folder)
    rows = []
    for kind in kinds:
        runs = samples[kind.name]
        if not runs:
            continue
        last = statistics.median(run.last_seconds for run in runs)
        row: dict[str, Any] = {
            "scenario": scenario.name, "contender": kind.name, "last_seconds": round(last, 3),
            "gb_per_second": round(moved / last / 1e9, 3),
            "cpu_seconds_per_gb": round(statistics.median(run.cpu_seconds for run in runs) / moved * 1e9, 3),
            "peak_mib": round(max(run.peak_bytes for run in runs) / MIB, 1), "runs": len(runs),
        }  # fmt: skip
        if scenario.bound_seconds:
            row["of_bound"] = round(last / scenario.bound_seconds(size), 3)
        for name in runs[0].notes:
            row[name] = round(statistics.median(run.notes[name] for run in runs), 4)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swarm", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the long scenarios too, five rounds")
    parser.add_argument("--only", default="")
    parser.add_argument("--contenders", default="")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--keep", default="swarm", help="the name of the results file; empty: keep none")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.full else 2)
    only = set(filter(None, options.only.split(",")))
    chosen = set(filter(None, options.contenders.split(",")))
    rows: list[dict[str, Any]] = []
    for scenario in SCENARIOS:
        if (only and scenario.name not in only) or (scenario.full_only and not options.full and not only):
            continue
        print(f"--- {scenario.name}: {scenario.what}", flush=True)
        kinds = []
        for kind in scenario.contenders:
            if chosen and kind.name not in chosen:
                continue
            if reason := kind.missing():
                print(f"{kind.name}: skipped: {reason}", file=sys.stderr)
            else:
                kinds.append(kind)
        with tempfile.TemporaryDirectory(prefix="trimaran-bench-") as base, contextlib.ExitStack() as stack:
            try:
                rows += run_scenario(scenario, kinds, rounds, options.scale, Path(base))
            except hosts.Unavailable as reason:
                print(f"{scenario.name}: skipped: {reason}", file=sys.stderr)
            stack.close()
    if options.keep and rows:
        from benchmarks import picture

        path = results.keep(options.keep, rows, note=f"scale {options.scale}, {rounds} rounds")
        picture.draw(rows, path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
