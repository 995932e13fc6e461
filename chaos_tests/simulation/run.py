"""Run worlds from seeds: `python -m chaos_tests.simulation --seeds 1000`, or one of them again with `--seed N`.

Owned here: one run from beginning to end, many runs on two processes, the summary, the replay command.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from chaos_tests.simulation import weather
from chaos_tests.simulation.process import ViolationError
from chaos_tests.simulation.rig import WITHOUT, Rig
from chaos_tests.simulation.stock import CANARIES
from chaos_tests.simulation.world import Result, World

SETTLE_SECONDS = 20.0


def kind_of(seed: int) -> str:
    return weather.KINDS[seed % len(weather.KINDS)]


def run(seed: int, seconds: float, rig: Rig | None = None) -> Result:
    """One world: faults for `seconds` of virtual time, then peace, in which all must agree."""
    kind = kind_of(seed)
    chance = random.Random(seed)
    size = 5 if chance.random() < (0.6 if kind == "members" else 0.3) else 3
    world = World(seed, kind, rig if rig is not None else Rig(), size, weather.tuning(kind))
    try:
        weather.begin(world, kind, chance.choice(weather.PACES.get(kind, (0.15, 0.4, 1.0))))
        while world.clock.now < seconds:
            world.clock.run_until(world.clock.now + 0.5)
            world.clients.check()
        weather.clear_up(world)
        peace = world.clock.now
        while world.clock.now < peace + SETTLE_SECONDS and not world.agreed():
            world.clock.run_until(world.clock.now + 0.25)
            world.clients.check()
        world.check_end()
    except ViolationError:
        pass
    return world.finish()


def first_failure(name: str, seeds: Iterable[int], seconds: float) -> Result | None:
    """The first of `seeds` that fails without the correction `name`; None when none does."""
    for seed in seeds:
        result = run(seed, seconds, WITHOUT[name])
        if result.violations:
            return result
    return None


def _run(arguments: tuple[int, float, str]) -> Result:
    seed, seconds, without = arguments
    return run(seed, seconds, WITHOUT[without] if without else None)


def run_many(seeds: Iterable[int], seconds: float, processes: int = 2, without: str = "") -> Iterator[Result]:
    jobs = [(seed, seconds, without) for seed in seeds]
    if processes == 1:
        yield from map(_run, jobs)
        return
    pool = ProcessPoolExecutor(processes)
    try:
        yield from pool.map(_run, jobs, chunksize=1)
    finally:
        pool.shutdown(cancel_futures=True)


def summarise(results: list[Result], wall_seconds: float, seconds: float) -> str:
    bites: Counter[str] = Counter()
    for result in results:
        bites.update(result.bites)
    failed = [result for result in results if result.violations]
    hours = sum(result.virtual_seconds for result in results) / 3600
    lines = [
        f"seeds {len(results)}   virtual hours {hours:.2f}   wall seconds {wall_seconds:.0f}",
        f"writes acknowledged {sum(result.acknowledged for result in results)}   "
        f"reads confirmed {sum(result.reads for result in results)}   "
        f"terms led {sum(result.terms for result in results)}",
        "what bit: " + ", ".join(f"{kind} {count}" for kind, count in sorted(bites.items())),
        f"violations {len(failed)}",
    ]
    for result in failed:
        lines.append(f"  seed {result.seed} ({result.weather}): {result.violations[0][:1500]}")
        lines.append(f"    again: make simulate SEED={result.seed} SECONDS={seconds:g}")
    return "\n".join(lines)


def _show_canaries() -> int:
    """Every finding must show on one of three seeds; 1 when one does not."""
    passed = 0
    for finding, canary in CANARIES.items():
        shown = next(filter(None, map(canary, range(3))), None)
        passed += shown is None
        sys.stdout.write(f"finding {finding:>2}: {shown or 'NOT SHOWN'}\n")
    return 1 if passed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=60, help="how many seeds, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual seconds of faults per seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no further seed after so long"
    )
    parser.add_argument("--without", default="", choices=["", *WITHOUT], help="take one correction away")
    parser.add_argument(
        "--canaries", action="store_true", help="show the findings on stock PySyncObj, and end"
    )
    options = parser.parse_args()
    if options.canaries:
        return _show_canaries()
    seeds = (
        [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    )
    began = time.monotonic()
    results = []
    processes = 1 if options.seed is not None else options.processes
    for result in run_many(seeds, options.seconds, processes, options.without):
        results.append(result)
        if result.violations:
            sys.stderr.write(f"seed {result.seed} ({result.weather}): {result.violations[0][:300]}\n")
        if time.monotonic() - began > options.minutes * 60:
            break
    if options.seed is not None:
        sys.stdout.write(f"digest {results[0].digest}\n")
    sys.stdout.write(summarise(results, time.monotonic() - began, options.seconds) + "\n")
    return 1 if any(result.violations for result in results) else 0
