"""A swarm that changes while a download runs: unequal seeders, one that falls, one that joins, one that goes.

    python -m chaos_tests.live [--only SCENARIO,...] [--rounds N] [--loopback] [--scale S] [--out DIR] [--keep NAME]

Real trackers and peers over TLS, each peer in a network namespace with limited upload (`tbf`) where the user is
root; elsewhere on loopback with the peers' own limits. Bars: seeders of 2, 8 and 32 MB/s give at least 0.94 of their sum;
when one falls to a tenth the others carry its share within 3 s; one that joins is used within 2 s of being ready;
one that ends in order is gone from the swarm at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from benchmarks import hosts
from benchmarks import results as kept
from benchmarks.hosts import LOOPBACK, Host
from benchmarks.processes import Process
from chaos_tests import ending
from chaos_tests.people import Person, until
from chaos_tests.ports import free_base_port
from peer import control
from peer.reports import PsRow, TrimaranError

MB, MIB = 1_000_000, 1 << 20
GROUP, NAME = "boats", "hull.bin"
SUM_SHARE_MIN = 0.94
FALL_SECONDS, JOIN_SECONDS, GONE_SECONDS = 3.0, 2.0, 1.0
SAMPLE_SECONDS = 0.2
WINDOW_SECONDS = 2.0


class Net:
    """Where a scenario takes place: a host for each peer, one for the trackers, and a hand on their rates."""

    def __init__(self, peers: list[Host], tracker: Host, rates: list[int], *, namespaces: bool) -> None:
        self.peers, self.tracker, self.rates, self.namespaces = peers, tracker, rates, namespaces

    async def set_rate(self, person: Person, number: int, bytes_per_second: int) -> None:
        if self.namespaces:
            words = [*self.peers[number].prefix, "tc", "qdisc", "change", "dev", "eth0", "root", "tbf"]
            words += ["rate", f"{bytes_per_second * 8}bit", "burst", str(128 * 1024), "latency", "50ms"]
            await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)
        else:
            await person.ok("peer", "limits", "--up", str(bytes_per_second))


@contextmanager
def net(rates: list[int], *, loopback: bool) -> Iterator[Net]:
    """Hosts with these upload rates (0: unlimited)."""
    if not loopback:
        with contextlib.suppress(hosts.Unavailable), hosts.limited(rates) as (peers, bridge):
            yield Net(peers, bridge, rates, namespaces=True)
            return
    yield Net([LOOPBACK] * len(rates), LOOPBACK, rates, namespaces=False)


class Scene:
    """Trackers, and people with a peer each; the first founded the group."""

    def __init__(self, folder: Path, place: Net) -> None:
        self.folder, self.place = folder, place
        self.people: list[Person] = []
        self.source = folder / NAME
        port = free_base_port(3)
        words = [sys.executable, "-m", "benchmarks.trackers", str(folder / "trackers"), place.tracker.address]
        self._trackers = Process([*words, str(port)], folder / "trackers.log", prefix=place.tracker.prefix)
        self._urls: list[str] = []

    async def set_up(self, size_bytes: int) -> None:
        with self.source.open("wb") as file:
            for _ in range(size_bytes // MIB):
                file.write(os.urandom(MIB))
        log = self.folder / "trackers.log"
        await until(lambda: b'"nodes"' in log.read_bytes(), "the trackers are ready", 60)
        told = orjson.loads(next(line for line in log.read_bytes().splitlines() if b'"nodes"' in line))
        self._urls = [node["http"] for node in told["nodes"]]
        ca = Path(told["ca"])
        for number, host in enumerate(self.place.peers):
            person = Person(
                f"person-{number}", self.folder, self._urls, ca, prefix=host.prefix, host=host.address
            )
            self.people.append(person)
            await (person.join(GROUP, self.people[0]) if number else person.found(GROUP))

    async def start(self, number: int, *, shares: bool) -> Person:
        person = self.people[number]
        rate = self.place.rates[number]
        await person.start(up="" if self.place.namespaces or not rate else str(rate))
        if shares:
            await person.share(self.source, GROUP)
        return person

    async def get(self, person: Person, down: int = 0) -> dict[str, Any]:
        words = ["get", f"{GROUP}/{NAME}", "-o", str(self.folder / f"{person.name}-got")]
        report: dict[str, Any] = await person.ok(
            *words, *(["--down", str(down)] if down else []), seconds=300
        )
        return report

    async def tear_down(self) -> None:
        for person in self.people:
            await person.kill()
        await asyncio.to_thread(self._trackers.stop)
        self._trackers.kill()


async def row(person: Person) -> PsRow | None:
    """The file's row, asked of the peer itself: a command would cost a core for half a second."""
    try:
        rows = await control.call(person.home / "control.sock", "ps", {}, list[PsRow])
    except (ConnectionError, TrimaranError):
        return None
    return next((each for each in rows if each.name == NAME), None)


async def done_bytes(person: Person) -> int:
    found = await row(person)
    return found.done_bytes if found else 0


async def uploaded_bytes(person: Person) -> int:
    found = await row(person)
    return found.uploaded_bytes if found else 0


Result = dict[str, Any]


async def unequal(scene: Scene, scale: float) -> Result:
    size = int(256 * scale) * MIB
    await scene.set_up(size)
    for number in range(3):
        await scene.start(number, shares=True)
    downloader = await scene.start(3, shares=False)
    report = await scene.get(downloader)
    total = sum(scene.place.rates[:3])
    share = size / report["seconds"] / total
    return {
        "of_the_sum": round(share, 3),
        "seconds": round(report["seconds"], 2),
        "held": share >= SUM_SHARE_MIN,
    }


async def falls(scene: Scene, scale: float) -> Result:
    """Three seeders of 8 MB/s, a download limited to 12: when one falls, the others have room for its share."""
    limit = 12 * MB
    await scene.set_up(int(200 * scale) * MIB)
    for number in range(3):
        await scene.start(number, shares=True)
    downloader = await scene.start(3, shares=False)
    getting = asyncio.create_task(scene.get(downloader, limit))
    try:
        await until(lambda: _more(downloader, 24 * MB), "a steady download", 60)
        await scene.place.set_rate(scene.people[2], 2, 800_000)
        fallen = time.monotonic()
        samples = [(fallen, await done_bytes(downloader))]
        carried = 0.0
        while not getting.done() and time.monotonic() < fallen + 12:
            await asyncio.sleep(SAMPLE_SECONDS)
            samples.append((time.monotonic(), await done_bytes(downloader)))
        # The first moment from which a window on is carried at the full rate again.
        for begun, before in samples:
            later = next(((at, now) for at, now in samples if at >= begun + WINDOW_SECONDS), None)
            if later is None:
                break
            if (later[1] - before) / (later[0] - begun) >= SUM_SHARE_MIN * limit:
                carried = begun - fallen
                return {"carried_after_seconds": round(carried, 2), "held": carried <= FALL_SECONDS}
        return {"carried_after_seconds": None, "held": False}
    finally:
        getting.cancel()
        await asyncio.gather(getting, return_exceptions=True)


async def _more(person: Person, count: int) -> bool:
    return await done_bytes(person) >= count


async def joins(scene: Scene, scale: float) -> Result:
    await scene.set_up(int(96 * scale) * MIB)
    await scene.start(0, shares=True)
    second = await scene.start(1, shares=True)
    assert await second.stop() == 0
    downloader = await scene.start(2, shares=False)
    getting = asyncio.create_task(scene.get(downloader))
    try:
        await until(lambda: _more(downloader, 8 * MB), "a running download", 60)
        await scene.start(1, shares=False)  # it shares again what it shared before
        ready = time.monotonic()

        async def used() -> bool:
            return await uploaded_bytes(second) > 0

        await until(used, "the new seeder is used", 30)
        seconds = time.monotonic() - ready
        return {"used_after_seconds": round(seconds, 2), "held": seconds <= JOIN_SECONDS}
    finally:
        getting.cancel()
        await asyncio.gather(getting, return_exceptions=True)


async def leaves(scene: Scene, scale: float) -> Result:
    await scene.set_up(int(64 * scale) * MIB)
    await scene.start(0, shares=True)
    second = await scene.start(1, shares=True)
    downloader = await scene.start(2, shares=False)
    getting = asyncio.create_task(scene.get(downloader))
    await until(lambda: _more(downloader, 8 * MB), "a running download", 60)
    assert await second.stop() == 0
    ended = time.monotonic()

    async def gone() -> bool:
        told = await scene.people[0].ok("info", f"{GROUP}/{NAME}")
        return second.peer_id not in {peer["peer_id"] for peer in told["peers"]}

    await until(gone, "it is gone from the swarm", 60)
    seconds = time.monotonic() - ended
    report = await getting
    # The question itself is a command of its own, which takes its time; the first answer must say so.
    return {"gone_after_seconds": round(seconds, 2), "finished": report["verified"], "held": report["verified"]
            and seconds <= GONE_SECONDS + 3.0}  # fmt: skip


Scenario = tuple[list[int], Callable[[Scene, float], Awaitable[Result]]]
SCENARIOS: dict[str, Scenario] = {
    "unequal": ([2 * MB, 8 * MB, 32 * MB, 0], unequal),
    "falls": ([8 * MB, 8 * MB, 8 * MB, 0], falls),
    "joins": ([4 * MB, 4 * MB, 0], joins),
    "leaves": ([4 * MB, 4 * MB, 0], leaves),
}


async def play(name: str, *, loopback: bool, scale: float, out: Path) -> Result:
    """One scenario."""
    rates, scenario = SCENARIOS[name]
    folder = Path(tempfile.mkdtemp(prefix="trimaran-live-"))
    with net(rates, loopback=loopback) as place:
        scene = Scene(folder, place)
        try:
            result = await scenario(scene, scale)
        finally:
            await scene.tear_down()
            out.mkdir(parents=True, exist_ok=True)
            for log in folder.glob("*.log"):
                shutil.copy(log, out / f"{name}-{log.name}")
            shutil.rmtree(folder, ignore_errors=True)
        return {"scenario": name, "namespaces": place.namespaces, **result}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos_tests.live", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--loopback", action="store_true", help="no namespaces, the peers' own limits")
    parser.add_argument("--scale", type=float, default=1.0, help="of the file sizes")
    parser.add_argument("--rounds", type=int, default=1, help="of each scenario")
    parser.add_argument("--out", type=Path, default=Path("chaos-report/live"))
    parser.add_argument("--keep", default="", help="keep the results under this name in benchmarks/results")
    options = parser.parse_args()
    ending.prepare()
    results = []
    for name in [name for name in options.only.split(",") for _ in range(options.rounds)]:
        results.append(
            ending.run(play(name, loopback=options.loopback, scale=options.scale, out=options.out))
        )
        print(json.dumps(results[-1]), flush=True)
    (options.out / "results.json").write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    if options.keep:
        kept.keep(options.keep, results, "shares of the sum of the raw upload rates; seconds from the event")
    return int(not all(result["held"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
