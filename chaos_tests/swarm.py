"""Real peers in a chaos run: `peer run` processes with homes of their own, and downloads between them.

Owned here: starting, stopping and linking peers (each behind a proxy that it advertises), sharing files,
long downloads with their progress recorded, and readings of the swarm for the check of leases. What is done
to peers stands in `peer_faults.py`. One peer lies: it sends wrong bytes now and then (`peer_entry.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from chaos_tests.client import Api
from chaos_tests.history import FOREVER_NS, Fault, Life, Presence, Recorder, Transfer
from chaos_tests.ports import free_ports
from chaos_tests.proxy import Link
from chaos_tests.workload import PASSWORD
from peer import control
from peer.reports import GetReport, Progress, TrimaranError

CLI = [sys.executable, "-m", "trimaran"]
ROOT = Path(__file__).parents[1]

SHARE_SECONDS_MAX = 120.0
SETTLE_SECONDS = 5.0  # what was just shared is told to the trackers by then
ANNOUNCED_AGAIN_SECONDS = 12.0
SMALL_DISK_BYTES = 256 << 20
LIES = "peer sends wrong bytes"
FAR_TO_GO = 0.6
STILL_SECONDS = 60.0  # of a download that tells nothing: its peer is asked what it waits for
PROGRESS_EVERY_NS = 1_000_000_000


class CliError(RuntimeError):
    """A command ended with another exit code than 0 (-1: no end in time)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Peer:
    """One peer: its home, its user, its process, its link."""

    def __init__(self, name: str, folder: Path, port: int, seed: int) -> None:
        self.name, self.folder = name, folder / name
        self.home, self.target = self.folder / "home", self.folder / "got"
        self.log = folder / f"{name}.log"
        self.port = port
        self.link = Link(name, ("127.0.0.1", port), seed)
        self.peer_id = ""
        self.lies = False
        self.small_disk = False
        self.process: asyncio.subprocess.Process | None = None
        self.running = asyncio.Event()
        self.commands: set[asyncio.subprocess.Process] = set()
        self.life: Life | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None


class SharedFile(NamedTuple):
    path: Path
    sha256: str
    size_bytes: int
    seeders: list[str]
    from_ns: int  # its seeders are in the trackers' books by then


class Swarm:
    def __init__(
        self, folder: Path, recorder: Recorder, urls: dict[str, str], ca: Path, seed: int, rate: str
    ) -> None:
        self.folder, self.recorder, self.urls, self.ca, self.seed = folder, recorder, urls, ca, seed
        self.random = random.Random(f"swarm/{seed}")
        self.rate = rate  # of each peer's upload, as the command takes it: it makes downloads last
        self.peers: dict[str, Peer] = {}
        self.files: dict[str, SharedFile] = {}
        self.group = "swarm"
        self.missing: list[str] = []
        self._mounts: list[Path] = []
        self._under_way: list[Transfer] = []
        folder.mkdir(parents=True, exist_ok=True)

    # --- setting up -------------------------------------------------------------------------------

    async def set_up(
        self, peers: int, files: int, size_bytes: int, seeders_per_file: int = 2, *, hurt: bool = False
    ) -> None:
        """Sign everyone up, one group with all of them, some seeders for each file. Before any fault. With
        `hurt`, the last peer has a small disk and the last but one lies."""
        for number, port in enumerate(free_ports(peers)):
            peer = Peer(f"peer-{number}", self.folder, port, self.seed)
            self.peers[peer.name] = peer
            peer.lies = hurt and number == peers - 2
            if hurt and number == peers - 1:
                self._mount_small(peer)
            for folder in (peer.home, peer.target):
                folder.mkdir(parents=True, exist_ok=True)
            await peer.link.start()
        await asyncio.gather(*(self._sign_up(n, p) for n, p in enumerate(self.peers.values())))
        first, *others = self.peers.values()
        await self.cli(first, "group", "create", self.group)
        await asyncio.gather(*(self.cli(peer, "group", "join", self.group) for peer in others))
        for number in range(1, peers):
            await self.cli(first, "group", "accept", self.group, f"swarm-{number}")
        await asyncio.gather(*(self.start(peer) for peer in self.peers.values()))
        names = list(self.peers)
        for number in range(files):
            seeders = [names[(number + k) % peers] for k in range(seeders_per_file)]
            await self.share_new(f"source-{number}.bin", size_bytes, seeders)

    async def _sign_up(self, number: int, peer: Peer) -> None:
        await self.cli(peer, "register", f"swarm-{number}", seconds=120)

    def _mount_small(self, peer: Peer) -> None:
        peer.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() != 0:
            self.missing.append("a peer's full disk: a small file system needs root")
            return
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(peer.folder)],
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode:
            self.missing.append(f"a peer's full disk: {done.stderr.decode().strip()}")
            return
        self._mounts.append(peer.folder)
        peer.small_disk = True

    async def share_new(self, name: str, size_bytes: int, seeders: list[str]) -> None:
        """Make a file of random bytes and let peers share it. Raises `CliError`."""
        path = self.folder / name
        digest = await asyncio.to_thread(_random_file, path, size_bytes)
        for seeder in seeders:
            await self.share(self.peers[seeder], path)
        from_ns = self.recorder.now_ns() + int(SETTLE_SECONDS * 1e9)
        self.files[name] = SharedFile(path, digest, size_bytes, seeders, from_ns)

    async def share(self, peer: Peer, path: Path) -> None:
        """Asking again after a refusal, as a person would while trackers are gone. Raises `CliError`."""
        until = asyncio.get_running_loop().time() + SHARE_SECONDS_MAX
        while True:
            try:
                await self.cli(peer, "share", str(path), "--group", self.group)
                return
            except CliError:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(1)

    async def forget(self, name: str) -> None:
        """Take a file off the group and off the disks."""
        shared = self.files.pop(name)
        with contextlib.suppress(CliError):
            await self.cli(self.peers[shared.seeders[0]], "remove", f"{self.group}/{name}")
        shared.path.unlink(missing_ok=True)
        for peer in self.peers.values():
            (peer.target / name).unlink(missing_ok=True)

    async def start(self, peer: Peer) -> None:
        if peer.alive:
            return
        for _ in range(5):
            if await self._started(peer):
                break
        else:
            raise RuntimeError(f"{peer.name} does not start: {peer.log.read_text(errors='replace')[-500:]}")
        peer.life = Life(
            peer=peer.name, peer_id=peer.peer_id, from_ns=self.recorder.now_ns(), to_ns=FOREVER_NS
        )
        peer.running.set()

    async def _started(self, peer: Peer) -> bool:
        """One try. A command that was on its way when the peer died may hold its home for a moment."""
        before = peer.log.stat().st_size if peer.log.exists() else 0
        with peer.log.open("ab") as log:
            peer.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "chaos_tests.peer_entry", "peer", "run", *self._common(peer), "--json", "--up", self.rate,
                "--listen", f"127.0.0.1:{peer.port}", "--advertise", f"https://127.0.0.1:{peer.link.port}",
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env={**os.environ, "TRIMARAN_RIG_LIE": "0.05" if peer.lies else ""},
            )  # fmt: skip
        for _ in range(1200):
            text = peer.log.read_bytes()[before:]
            if b'"peer_id"' in text:
                line = next(part for part in text.splitlines() if b'"peer_id"' in part)
                peer.peer_id = json.loads(line)["peer_id"]
                return True
            if not peer.alive:
                return False
            await asyncio.sleep(0.05)
        return False

    def _common(self, peer: Peer) -> list[str]:
        return ["--home", str(peer.home), "--trackers", ",".join(self.urls.values()), "--ca", str(self.ca)]

    async def cli(self, peer: Peer, *words: str, seconds: float = 40) -> str:
        process = await asyncio.create_subprocess_exec(
            *CLI, *words, *self._common(peer), "--json", stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
            env={**os.environ, "TRIMARAN_PASSWORD": PASSWORD},
        )  # fmt: skip
        peer.commands.add(process)
        told = f"{peer.name}: trimaran {' '.join(words)}"
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        except TimeoutError:
            raise CliError(f"{told}: no end within {seconds:.0f} s", -1) from None
        finally:
            peer.commands.discard(process)
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise CliError(f"{told}: exit {process.returncode}: {err.decode().strip()}", process.returncode)
        return out.decode()

    async def kill(self, peer: Peer) -> None:
        """kill -9 the peer, and what commands are talking to it."""
        peer.running.clear()
        self.silent(peer)
        for process in [peer.process, *peer.commands]:
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        if peer.process is not None:
            await peer.process.wait()

    def silent(self, peer: Peer) -> None:
        """From now on it cannot announce."""
        if peer.life is not None:
            peer.life.to_ns = self.recorder.now_ns()
            self.recorder.add(peer.life)
            peer.life = None

    @contextlib.contextmanager
    def out_of_touch(self, peer: Peer) -> Iterator[None]:
        """Others cannot reach it, and may say so: it is hidden then until it announces again."""
        self.silent(peer)
        try:
            yield
        finally:
            if peer.alive:
                from_ns = self.recorder.now_ns() + int(ANNOUNCED_AGAIN_SECONDS * 1e9)
                peer.life = Life(peer=peer.name, peer_id=peer.peer_id, from_ns=from_ns, to_ns=FOREVER_NS)

    # --- downloading ------------------------------------------------------------------------------

    async def download(self, peer: Peer, name: str, seconds: float) -> Transfer:
        """`get` until it is whole, asking again after every interruption, as a person would."""
        shared = self.files[name]
        transfer = Transfer(
            peer=peer.name, group=self.group, name=name, begin_ns=self.recorder.now_ns(),
            size_bytes=shared.size_bytes, wanted_sha256=shared.sha256, progress=[],
        )  # fmt: skip
        until = asyncio.get_running_loop().time() + seconds
        self._under_way.append(transfer)
        try:
            while not transfer.got_sha256 and (left := until - asyncio.get_running_loop().time()) > 0:
                try:
                    await asyncio.wait_for(peer.running.wait(), left)
                    await self._get(peer, name, transfer, left)
                    transfer.exit_code = 0
                    transfer.got_sha256 = await asyncio.to_thread(_sha256, peer.target / name)
                except (CliError, TimeoutError) as error:
                    transfer.exit_code = error.code if isinstance(error, CliError) else -1
                    await asyncio.sleep(0.5)
        finally:
            self._under_way.remove(transfer)
            transfer.end_ns = self.recorder.now_ns()
            self.recorder.add(transfer)
        return transfer

    def go_on(self) -> bool:
        """Whether a download has begun and has far to go."""
        return any(
            transfer.progress and transfer.progress[-1][1] < FAR_TO_GO * transfer.size_bytes
            for transfer in self._under_way
        )

    async def rounds(self, size_bytes: int, until_ns: int) -> None:
        """Download the files there are; then share a new one and download that, and so on until the time
        is up, so that there are downloads under way all the time. Ends when what was begun has ended."""
        own = list(self.files)  # a fault of a peer shares and forgets files of its own meanwhile
        number = len(own)
        names = list(self.peers)
        while True:
            await asyncio.gather(
                *(
                    self.download(peer, name, 600)
                    for name in own
                    for peer in self.peers.values()
                    # Who lies comes into quarantine, where nobody serves it.
                    if peer.name not in self.files[name].seeders and not peer.lies
                )
            )
            if self.recorder.now_ns() > until_ns:
                return
            for name in own:
                await self.forget(name)
            own = []
            honest = [name for name in names if not self.peers[name].lies]
            seeders = [honest[number % len(honest)], *(n for n in names if self.peers[n].lies)][:2]
            while not own and self.recorder.now_ns() < until_ns:
                name = f"source-{number}.bin"
                with contextlib.suppress(CliError):  # sharing anew needs the trackers
                    await self.share_new(name, size_bytes, seeders)
                    own = [name]
            number += 1

    async def _get(self, peer: Peer, name: str, transfer: Transfer, seconds: float) -> None:
        """Of a peer that runs, as the command asks it: through its control socket, without a process for each
        (dozens of them would be the heaviest load of a run). Of one that does not: the command itself. Raises
        `CliError`."""
        if peer.process is None:
            await self.cli(peer, "get", f"{self.group}/{name}", "-o", str(peer.target), seconds=seconds)
            return
        given = {
            "group": self.group, "name": name, "target_folder": str(peer.target), "down_bytes_per_second": 0,
            "checksum": False,
        }  # fmt: skip

        def follow(progress: Progress) -> None:
            now = self.recorder.now_ns()
            if not transfer.progress or now > transfer.progress[-1][0] + PROGRESS_EVERY_NS:
                transfer.progress.append((now, progress.done_bytes))

        def still() -> None:
            if not transfer.progress and peer.alive and peer.process is not None:
                peer.process.send_signal(signal.SIGUSR2)

        socket = peer.home / "control.sock"
        witness = asyncio.get_running_loop().call_later(STILL_SECONDS, still)
        try:
            async with asyncio.timeout(seconds):
                await control.call(socket, "get", given, GetReport, follow)
        except TrimaranError as error:
            raise CliError(str(error), int(error.exit_code)) from None
        except (OSError, TimeoutError) as error:
            raise CliError(f"{peer.name}: {error!r}", -1) from None
        finally:
            witness.cancel()

    async def observe(self, api: Api, nodes: list[str], stop: asyncio.Event) -> None:
        """Read the swarms, linearizably, again and again."""
        known = {peer.peer_id for peer in self.peers.values()}
        while not stop.is_set():
            for name, shared in list(self.files.items()):
                call = self.recorder.now_ns()
                reply = await api.call(
                    self.random.choice(nodes), "GET", f"/v1/groups/{self.group}/files/{name}/swarm", seconds=4,
                    query="consistency=linearizable",
                )  # fmt: skip
                if reply.end == "ok" and call > shared.from_ns and name in self.files:
                    now = self.recorder.now_ns()
                    seen = {row["peer_id"] for row in reply.body["peers"]}
                    wanted = {self.peers[p].peer_id for p in shared.seeders}
                    for peer_id in known & (wanted | seen):
                        self.recorder.add(
                            Presence(at_ns=now, call_ns=call, peer_id=peer_id, seen=peer_id in seen)
                        )
            await asyncio.sleep(0.5)

    def tell_lies(self, begin_ns: int) -> None:
        """What the peer that lies has sent since it runs, as a fault that lasted all the time."""
        for peer in self.peers.values():
            if peer.lies:
                lies = peer.log.read_text(errors="replace").count('RIG {"lies"')
                self.recorder.add(
                    Fault(
                        kind=LIES, target=peer.name, begin_ns=begin_ns, end_ns=self.recorder.now_ns(), bit=lies > 0,
                        detail=f"{lies} stretches garbled under intact TLS",
                    )
                )  # fmt: skip

    async def tear_down(self) -> None:
        for peer in self.peers.values():
            self.silent(peer)
            if peer.alive and peer.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    peer.process.send_signal(signal.SIGCONT)
                    peer.process.kill()
                await peer.process.wait()
            for process in list(peer.commands):
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await peer.link.stop()

    def unmount(self) -> None:
        for folder in self._mounts:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def _random_file(path: Path, size_bytes: int) -> str:
    """Fill a new file; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
