"""How soon a right ends when it is withdrawn: from the acknowledgement to the last byte served.

    python -m chaos_tests.revocation [--trials 50] [--others 6] [--seed N] [--out DIR] [--no-blackout]

Three real trackers, a real seeder whose upload is limited so that transfers are always under way, a member
that goes on asking whatever it is told (`asker.py`), and a second one who must not notice anything. In every third
trial the tracker that the seeder listens to is killed, paused or cut off at that moment. Kicks first, then the other
ways of withdrawing: leaving, removing the file, deleting the group. At last all trackers are killed, with
tokens of a short life: nothing may be served after they expire. Holds when every trial is within its bar: 1 s when all
is well, 3 s otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from msgspec import Struct, to_builtins

from benchmarks import results
from chaos_tests import ending
from chaos_tests.asker import Asker, Member
from chaos_tests.history import Recorder
from chaos_tests.people import PASSWORD, Person
from chaos_tests.rig import Rig
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError

WELL_SECONDS = 1.0
HURT_SECONDS = 3.0
WATCHED_AFTER_SECONDS = 1.0  # beyond the bar, to see that nothing comes any more
DELIVERY_MS = 250  # bytes that left in time may be read so much later
UPLOAD = "6M"
FILE_BYTES = 48 << 20
FAULTS = ("killed", "paused", "cut off")
GROUP, SOURCE = "boats", "hull.bin"
OTHERS = ("leave", "remove file", "delete group")


class Trial(Struct, kw_only=True):
    number: int
    way: str
    fault: str
    led: bool  # whether the tracker that was hurt led the cluster
    acknowledged_seconds: float  # how long the withdrawal itself took
    seconds: float  # from the acknowledgement to the last byte; negative when that came before
    bar_seconds: float
    served_bytes: int
    cut: int  # transfers ended in the middle
    refused: int
    witness_bytes: int  # of the other member, after it
    held: bool


class ProxiedRig(Rig):
    """A rig whose nodes tell the proxies' addresses, so that nobody learns a way around them."""

    def _places(self, node_id: str) -> list[str]:
        node = self.nodes[node_id]
        return [
            "--http", f"127.0.0.1:{self._user_ports[node_id]}", "--http-listen", f"127.0.0.1:{node.http}",
            "--raft", f"127.0.0.1:{node.raft}", "--data-dir", str(node.folder),
        ]  # fmt: skip

    def direct(self, *without: str) -> list[str]:
        """URLs past the proxies."""
        return [f"https://127.0.0.1:{node.http}" for name, node in self.nodes.items() if name not in without]


class Place:
    """What a run has: the rig, a seeder, its owner's client, and members made as they are needed."""

    def __init__(self, rig: ProxiedRig, seeder: Person, source: Path, chance: random.Random) -> None:
        self.rig, self.seeder, self.source, self.chance = rig, seeder, source, chance
        self.ca = rig.folder / "ca.pem"
        host, _, port = seeder.address.rpartition(":")
        self.host, self.port = host, int(port)
        self._count = 0
        self._clients: list[TrackerClient] = []
        self._members: list[Member] = []

    async def member(self, group: str) -> Member:
        self._count += 1
        member = Member(f"member-{self._count}", self.rig.folder / "members", self.ca, self.rig.direct())
        self._members.append(member)
        await member.sign_up()
        await member.join(group, await self.owner())
        return member

    async def owner(self, *without: str) -> TrackerClient:
        """The owner's client, past the proxies, that does not ask the nodes named."""
        client = TrackerClient(self.rig.direct(*without), ca=self.ca)
        self._clients.append(client)
        return client.as_session((await client.login(self.seeder.name, PASSWORD)).session)

    async def share(self, group: str) -> tuple[str, int]:
        """Share the source to the group; (manifest id, pieces)."""
        return await self.seeder.share(self.source, group)

    async def followed(self, seconds: float = 20.0) -> str:
        """Which tracker the seeder listens to: the one whose heartbeats pass the proxies."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            before = {n: self.rig.user_link(n).backward.passed_bytes for n in self.rig.node_ids}
            await asyncio.sleep(0.7)
            grown = [n for n in before if self.rig.user_link(n).backward.passed_bytes > before[n]]
            if len(grown) == 1:
                return grown[0]
        raise TimeoutError("the seeder listens to no tracker")

    async def lead_elsewhere(self, number: int) -> str:
        """The tracker that the seeder listens to. In most trials another one shall lead: then a removal is
        acknowledged at once, and the seeder has yet to find out."""
        followed = await self.followed()
        if number % 4 and await self.rig.leader() == followed:
            folder = self.rig.nodes["n1"].folder / "operator"
            pair = (folder / "operator.pem", folder / "operator.key")
            to = self.chance.choice([n for n in self.rig.node_ids if n != followed])
            async with TrackerClient(self.rig.direct(), ca=self.ca, client_certificate=pair) as operator:
                await operator.transfer_leadership(to)
            await asyncio.sleep(0.5)  # until the rig has seen who leads
        return followed

    async def hurt(self, node_id: str, fault: str) -> None:
        if fault == "killed":
            await self.rig.kill(node_id)
        elif fault == "paused":
            self.rig.pause(node_id)
        elif fault == "cut off":
            self.rig.user_link(node_id).cut()
            for other in self.rig.node_ids:
                if other != node_id:
                    self.rig.way(node_id, other).set(held=True)
                    self.rig.way(other, node_id).set(held=True)

    async def heal(self) -> None:
        self.rig.heal()
        for node_id in self.rig.node_ids:
            await self.rig.start(node_id)
        await self.rig._until(self.rig._all_voting, 30, "all nodes count again")

    async def close(self) -> None:
        for member in self._members:
            await member.close()
        for client in self._clients:
            await client.close()


@asynccontextmanager
async def place(
    seed: int, out: Path, file_bytes: int = FILE_BYTES, upload: str = UPLOAD
) -> AsyncIterator[Place]:
    out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(out / "history.jsonl", seed)
    rig = ProxiedRig(Path(tempfile.mkdtemp(prefix="trimaran-revocation-")), recorder, 3, seed)
    seeder: Person | None = None
    made: Place | None = None
    try:
        await rig.set_up()
        seeder = Person("ada", rig.folder / "peers", list(rig.urls.values()), rig.folder / "ca.pem")
        await seeder.found(GROUP)
        await seeder.start(up=upload)
        source = rig.folder / SOURCE
        with source.open("wb") as file:
            for _ in range(file_bytes >> 20):
                file.write(os.urandom(1 << 20))
        made = Place(rig, seeder, source, random.Random(seed))
        yield made
    finally:
        if made:
            await made.close()
        if seeder:
            await seeder.kill()
        await rig.tear_down()
        recorder.close()
        rig.keep_logs(out)
        rig.unmount()
        shutil.rmtree(rig.folder, ignore_errors=True)


Withdraw = Callable[[TrackerClient, Member], Awaitable[object]]


async def trial(at: Place, number: int, way: str, fault: str) -> Trial:
    """One withdrawal, measured."""
    group, name = GROUP, SOURCE
    if way == "delete group":
        group = f"group-{number}"
        await (await at.owner()).create_group(group)
    manifest_id, pieces = await at.share(group)
    thief = await at.member(group)
    # Kicking and leaving must not touch others; what removes the file or the group takes everyone's right.
    alone = way in ("kick", "leave")
    other = await at.member(group) if alone else None
    hit = await at.lead_elsewhere(number) if fault else ""
    led = bool(hit) and await at.rig.leader() == hit
    owner = await at.owner(*filter(None, [hit]))
    leaver = thief.trackers
    if way == "leave" and hit:
        leaver = TrackerClient(at.rig.direct(hit), ca=at.ca)
        at._clients.append(leaver)
        leaver = leaver.as_session((await leaver.login(thief.user, PASSWORD)).session)
    asker = Asker(thief, at.host, at.port, manifest_id, pieces)
    witness = Asker(other, at.host, at.port, manifest_id, pieces, connections=1) if other else None
    try:
        until = time.monotonic() + 15
        while asker.bytes < 2 << 20 or (witness and not witness.bytes):
            if time.monotonic() > until:
                raise TimeoutError(f"trial {number}: nothing is served: {asker.answers}")
            await asyncio.sleep(0.01)
        if fault:
            await at.hurt(hit, fault)
            await asyncio.sleep(at.chance.uniform(0.0, 0.15))
        before, asked = asker.bytes, time.monotonic()
        if way == "kick":
            await owner.remove_member(group, thief.user)
        elif way == "leave":
            await leaver.remove_member(group, thief.user)
        elif way == "remove file":
            await owner.remove_file(group, name)
        else:
            await owner.delete_group(group)
        acknowledged = time.monotonic()
        refused_before = asker.refused
        witness_before = witness.bytes if witness else 0
        bar = HURT_SECONDS if fault else WELL_SECONDS
        await asyncio.sleep(bar + WATCHED_AFTER_SECONDS)
        seconds = asker.last_byte_at - acknowledged
        seen = witness.bytes - witness_before if witness else 0
        kept = witness is None or (seen > 0 and not witness.refused and not witness.cut)
        refused = asker.refused - refused_before
        return Trial(
            number=number, way=way, fault=fault, led=led, acknowledged_seconds=round(acknowledged - asked, 3),
            seconds=round(seconds, 3), bar_seconds=bar,
            served_bytes=asker.bytes - before, cut=asker.cut, refused=refused, witness_bytes=seen,
            held=seconds < bar and refused > 0 and kept,
        )  # fmt: skip
    finally:
        await asker.stop()
        if witness:
            await witness.stop()
        await thief.close()
        if fault:
            await at.heal()


def plan(trials: int, others: int) -> list[tuple[str, str]]:
    """(way, fault) of each trial; every third with a fault, in turn."""
    ways = ["kick"] * trials + [OTHERS[k % len(OTHERS)] for k in range(others)]
    hurt = iter(FAULTS * (len(ways) // len(FAULTS) + 1))
    return [(way, next(hurt) if number % 3 == 1 else "") for number, way in enumerate(ways)]


async def withdraw(trials: list[tuple[str, str]], seed: int, out: Path) -> list[Trial]:
    done: list[Trial] = []
    async with place(seed, out) as at:
        for number, (way, fault) in enumerate(trials):
            done.append(await trial(at, number, way, fault))
            last = done[-1]
            mark = "" if last.held else "   <-- MISSED"
            print(
                f"{number:3}  {way:12}  {fault or '-':8} {'led' if last.led else '':4}"
                f"acknowledged in {last.acknowledged_seconds:6.3f} s, last byte {last.seconds:+7.3f} s  bar {last.bar_seconds:.0f} s"
                f"  cut {last.cut}  refused {last.refused}{mark}",
                flush=True,
            )
    return done


async def blackout(token_seconds: float, seed: int, out: Path) -> dict[str, Any]:
    """All trackers killed while a member asks on: what is served, and how long after its token's end."""
    environment = {"TRIMARAN_SERVICE_TOKEN_SECONDS": str(token_seconds)}
    with _environment(environment):
        async with place(seed, out) as at:
            manifest_id, pieces = await at.share(GROUP)
            member = await at.member(GROUP)
            asker = Asker(member, at.host, at.port, manifest_id, pieces)
            try:
                until = time.monotonic() + 10
                while asker.bytes < 1 << 20 and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                await member.renew(GROUP)
                for node_id in at.rig.node_ids:
                    await at.rig.kill(node_id)
                begun, dark = time.time_ns() // 1_000_000, asker.bytes
                left = (member.expires_at_ms - begun) / 1000
                await asyncio.sleep(max(0.0, left) + 3.0)
                late_ms = asker.last_byte_wall_ms - member.expires_at_ms
                return {
                    "token_seconds": token_seconds, "served_dark_bytes": asker.bytes - dark, "late_ms": late_ms,
                    "refused": asker.refused,
                    "held": asker.bytes > dark and -2000 < late_ms < DELIVERY_MS and asker.refused > 0,
                }  # fmt: skip
            finally:
                await asker.stop()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Any:
    """Settings of trackers, as their processes inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def summary(trials: list[Trial]) -> list[dict[str, Any]]:
    """A row for each way of withdrawing and each state of the seeder's tracker."""
    rows = []
    for way, fault in sorted({(t.way, t.fault) for t in trials}):
        these = [t for t in trials if (t.way, t.fault) == (way, fault)]
        seconds = [t.seconds for t in these]
        rows.append(
            {
                "way": way, "tracker": fault or "well", "trials": len(these),
                "median_seconds": round(statistics.median(seconds), 3), "worst_seconds": max(seconds),
                "bar_seconds": these[0].bar_seconds, "held": sum(t.held for t in these),
            }
        )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m chaos_tests.revocation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--trials", type=int, default=50, help="kicks")
    parser.add_argument(
        "--others", type=int, default=9, help="leaving, removing the file, deleting the group"
    )
    parser.add_argument("--token-seconds", type=float, default=8.0, help="of the blackout")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("chaos-report/revocation"))
    parser.add_argument("--keep", default="", help="keep the summary under this name in benchmarks/results")
    parser.add_argument("--no-blackout", action="store_true")
    options = parser.parse_args()
    ending.prepare()
    try:
        done = ending.run(
            withdraw(plan(options.trials, options.others), options.seed, options.out / "withdrawn")
        )
        dark = None
        if not options.no_blackout:
            dark = ending.run(blackout(options.token_seconds, options.seed, options.out / "blackout"))
    except (TrackerError, RuntimeError, TimeoutError) as error:
        print(f"the run broke off: {error}", file=sys.stderr)
        return 1
    rows = summary(done)
    note = f"seconds from the acknowledgement to the last byte served; blackout: {dark}"
    if options.keep:
        results.keep(options.keep, rows, note)
    else:
        print(results.table(rows))
    print(note)
    told = {"seed": options.seed, "trials": to_builtins(done), "blackout": dark}
    path = options.out / "results.json"
    path.write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    print(f"results: {path}")
    return int(not all(t.held for t in done) or (dark is not None and not dark["held"]))


if __name__ == "__main__":
    raise SystemExit(main())
