"""What happens to peers: killed, paused, a full disk, a damaged source, a bad line, a crowd.

Owned here: each fault as a thing that begins, ends, and can say whether it bit, as in `faults.py` for trackers.
A download that a fault interrupts must still end with the right bytes: the checkers see to that.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from chaos_tests.faults import Running, Schedule
from chaos_tests.history import Fault
from chaos_tests.rig import fill
from chaos_tests.swarm import CliError, Peer, Swarm

SMALL_FILE_BYTES = 4 << 20
CROWD = 6
PAUSE_SECONDS = (2.0, 6.0)
Act = Callable[[Swarm, random.Random, Peer, Running], Awaitable[None]]


async def killed(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    running.bit = peer.alive
    try:
        await swarm.kill(peer)
        await asyncio.sleep(chance.uniform(0.5, 3))
    finally:
        await swarm.start(peer)


async def paused(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    process = peer.process
    if not peer.alive or process is None:
        return
    with swarm.out_of_touch(peer):
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(chance.uniform(0.5, 4))
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            running.bit = state == "T"
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)


def bad_line(seconds: float, **what: float) -> Act:
    """On the peer's own link, both ways. Only bytes that were really held, lost or garbled count."""

    async def act(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
        ways = [peer.link.forward, peer.link.backward]
        before = sum(way.bitten for way in ways)
        with swarm.out_of_touch(peer):
            try:
                for way in ways:
                    way.set(**what)
                await asyncio.sleep(seconds * chance.uniform(0.5, 1))
                running.bit = sum(way.bitten for way in ways) > before
            finally:
                peer.link.heal()

    return act


async def resets(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    count = 0
    with swarm.out_of_touch(peer):
        for _ in range(4):
            count += peer.link.reset()
            await asyncio.sleep(chance.uniform(0.1, 0.6))
    running.bit, running.detail = count > 0, f"{count} connections"


async def _fetched(swarm: Swarm, peer: Peer, name: str, seconds: float = 300) -> None:
    """A download of its own, which the checkers see."""
    await swarm.download(peer, name, seconds)


async def disk_full(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    """A get onto a full disk says so (exit 9); with room again it ends well."""
    seeder = chance.choice([p for p in swarm.peers.values() if p is not peer and not p.lies])
    name = f"full-{swarm.recorder.now_ns()}.bin"
    await swarm.share_new(name, SMALL_FILE_BYTES, [seeder.name])
    filler = peer.folder / "filler"
    try:
        await asyncio.to_thread(fill, filler)
        await swarm.cli(peer, "get", f"{swarm.group}/{name}", "-o", str(peer.target), seconds=30)
    except CliError as error:
        running.bit, running.detail = error.code == 9, f"exit {error.code}"
    finally:
        filler.unlink(missing_ok=True)
    await _fetched(swarm, peer, name)
    await swarm.forget(name)


async def source_damaged(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    """The only seeder's file rots on its disk, its name and times unchanged: nothing wrong is accepted, and a
    second seeder with the true bytes lets it finish."""
    # Always the same witness of the same seeder: three would put it in quarantine, as they should.
    peers = list(swarm.peers.values())
    before = peers[peers.index(peer) - 1 :] + peers[: peers.index(peer) - 1]
    seeder, honest, *_ = [p for p in before if p is not peer and not p.lies]
    name = f"rotten-{swarm.recorder.now_ns()}.bin"
    await swarm.share_new(name, SMALL_FILE_BYTES, [seeder.name])
    path = swarm.files[name].path
    good = path.with_suffix(".good")
    good.write_bytes(path.read_bytes())
    times = path.stat()
    with path.open("r+b") as file:
        for place in range(100, SMALL_FILE_BYTES, 64 << 10):
            file.seek(place)
            file.write(b"\\x00ROT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    fetching = asyncio.create_task(_fetched(swarm, peer, name))
    await asyncio.sleep(4.0)
    sent, got = (
        await _done(swarm, seeder, name, "uploaded_bytes"),
        await _done(swarm, peer, name, "done_bytes"),
    )
    running.bit = bool(sent) and got == 0 and not fetching.done()
    running.detail = f"{sent} bytes sent from the rotten copy, {got} accepted"
    named = good.parent / "good" / name
    named.parent.mkdir(exist_ok=True)
    good.rename(named)
    try:
        await swarm.share(honest, named)
        await fetching
    finally:
        fetching.cancel()
        await swarm.forget(name)
        named.unlink(missing_ok=True)


async def _done(swarm: Swarm, peer: Peer, name: str, what: str) -> int | None:
    """A figure of a file's row in `ps`; None when there is no answer."""
    with suppress(CliError):
        rows = json.loads(await swarm.cli(peer, "ps", seconds=20))
        return next((int(row[what]) for row in rows if row["name"] == name), 0)
    return None


async def flash_crowd(swarm: Swarm, chance: random.Random, peer: Peer, running: Running) -> None:
    """New homes of one user, all at once, each with a get in the foreground."""
    seeder = chance.choice([p for p in swarm.peers.values() if p is not peer and not p.lies])
    name = f"crowd-{swarm.recorder.now_ns()}.bin"
    await swarm.share_new(name, SMALL_FILE_BYTES, [seeder.name])
    crowd = []
    for number in range(CROWD):
        one = Peer(f"{name.removesuffix('.bin')}-{number}", swarm.folder, 0, swarm.seed)
        for folder in (one.home, one.target):
            folder.mkdir(parents=True, exist_ok=True)
        one.running.set()
        crowd.append(one)
    user = f"swarm-{peer.name.partition('-')[2]}"
    for one in crowd:
        for _ in range(5):
            with suppress(CliError):
                await swarm.cli(one, "login", user, seconds=60)
                break
    transfers = await asyncio.gather(*(swarm.download(one, name, 300) for one in crowd))
    running.bit = sum(bool(transfer.got_sha256) for transfer in transfers) == CROWD
    running.detail = f"{CROWD} at once"
    for one in crowd:
        (one.target / name).unlink(missing_ok=True)
    await swarm.forget(name)


KINDS: dict[str, Act] = {
    "peer killed": killed,
    "peer paused": paused,
    "peer on a garbled line": bad_line(6, garble_chance=0.05),
    "peer half-open": bad_line(12, held=True),
    "peer on a slow line": bad_line(6, delay_seconds=0.2),
    "peer on a narrow line": bad_line(6, bytes_per_second=64e3),
    "peer's connections reset": resets,
    "peer's disk full": disk_full,
    "peer's source damaged": source_damaged,
    "flash crowd": flash_crowd,
}
FETCHING = ("peer's source damaged", "flash crowd")  # the peer gets a file, and a liar in quarantine cannot
PLAIN = ("peer killed", "peer paused", "peer's connections reset")


async def hurt(swarm: Swarm, kinds: list[str], until_ns: int, rest: asyncio.Lock) -> None:
    """One fault after another, every kind once first, until the time is up. `rest` is held meanwhile."""
    chance = swarm.random
    schedule = Schedule(kinds, swarm.seed, PAUSE_SECONDS)
    while swarm.recorder.now_ns() < until_ns:
        pause, kind = schedule.next()
        await asyncio.sleep(pause)
        small = [peer for peer in swarm.peers.values() if peer.small_disk]
        honest = [peer for peer in swarm.peers.values() if not peer.lies]
        others = honest if kind in FETCHING else list(swarm.peers.values())
        peer = small[0] if kind == "peer's disk full" else chance.choice(others)
        running = Running(target=peer.name)
        async with rest:
            begin = swarm.recorder.now_ns()
            try:
                await KINDS[kind](swarm, chance, peer, running)
            except (
                CliError
            ) as error:  # the trackers are being hurt at the same time: it had no chance to bite
                running.bit, running.detail = False, str(error)[:200]
            finally:
                fault = Fault(
                    kind=kind, target=running.target, begin_ns=begin, end_ns=swarm.recorder.now_ns(), bit=running.bit,
                    detail=running.detail,
                )  # fmt: skip
                swarm.recorder.add(fault)
        schedule.done(kind, fault.bit)


def usable(swarm: Swarm, kinds: Iterable[str]) -> list[str]:
    small = any(peer.small_disk for peer in swarm.peers.values())
    return [kind for kind in kinds if small or kind != "peer's disk full"]
