"""Real peers in a chaos run: `peer run` processes with homes of their own, and downloads between them.

Owned here: starting and hurting peers, sharing a few files, long downloads with their progress recorded,
and readings of the swarm for the check of leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

from chaos_tests.client import Api
from chaos_tests.history import FOREVER_NS, Fault, Life, Presence, Recorder, Transfer
from chaos_tests.workload import PASSWORD

CLI = [sys.executable, "-m", "trimaran"]
ROOT = Path(__file__).parents[1]


class Peer:
    """One peer: its home, its user, its process."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.home = name, folder / name
        self.log = folder / f"{name}.log"
        self.peer_id = ""
        self.process: asyncio.subprocess.Process | None = None
        self.life: Life | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Swarm:
    def __init__(
        self, folder: Path, recorder: Recorder, urls: dict[str, str], ca: Path, seed: int, rate: str
    ) -> None:
        self.folder, self.recorder, self.urls, self.ca = folder, recorder, urls, ca
        self.random = random.Random(f"swarm/{seed}")
        self.rate = rate  # of each peer's upload, as the command takes it: it makes downloads last
        self.peers: dict[str, Peer] = {}
        self.files: dict[str, tuple[Path, str, int]] = {}  # name -> (path, sha256, size)
        self.group = "swarm"
        self.seeders_per_file = 2
        folder.mkdir(parents=True, exist_ok=True)

    # --- setting up -------------------------------------------------------------------------------

    async def set_up(self, peers: int, files: int, size_bytes: int, seeders_per_file: int = 2) -> None:
        """Sign everyone up, one group with all of them, some seeders for each file. Before any fault."""
        self.seeders_per_file = seeders_per_file
        for number in range(peers):
            peer = Peer(f"peer-{number}", self.folder)
            peer.home.mkdir(parents=True, exist_ok=True)
            self.peers[peer.name] = peer
            await self.cli(peer, "register", f"swarm-{number}")
            if number == 0:
                await self.cli(peer, "group", "create", self.group)
            else:
                await self.cli(peer, "group", "join", self.group)
                await self.cli(self.peers["peer-0"], "group", "accept", self.group, f"swarm-{number}")
        for peer in self.peers.values():
            await self.start(peer)
        for number in range(files):
            path = self.folder / f"source-{number}.bin"
            with path.open("wb") as file:
                for _ in range(size_bytes >> 20):
                    file.write(os.urandom(1 << 20))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            self.files[path.name] = (path, digest, path.stat().st_size)
            for seeder in self._seeders(path.name):
                await self.cli(self.peers[seeder], "share", str(path), "--group", self.group, seconds=120)

    async def start(self, peer: Peer) -> None:
        if peer.alive:
            return
        before = peer.log.stat().st_size if peer.log.exists() else 0
        with peer.log.open("ab") as log:
            peer.process = await asyncio.create_subprocess_exec(
                *CLI, "peer", "run", *self._common(peer), "--listen", "127.0.0.1:0", "--json",
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )  # fmt: skip
        for _ in range(600):
            text = peer.log.read_bytes()[before:]
            if b'"peer_id"' in text:
                line = next(part for part in text.splitlines() if b'"peer_id"' in part)
                peer.peer_id = json.loads(line)["peer_id"]
                break
            if not peer.alive:
                raise RuntimeError(f"{peer.name} does not start: {text.decode(errors='replace')[-500:]}")
            await asyncio.sleep(0.05)
        peer.life = Life(peer_id=peer.peer_id, from_ns=self.recorder.now_ns(), to_ns=FOREVER_NS)
        with contextlib.suppress(RuntimeError):
            await self.cli(peer, "peer", "limits", "--up", self.rate)

    def _common(self, peer: Peer) -> list[str]:
        return ["--home", str(peer.home), "--trackers", ",".join(self.urls.values()), "--ca", str(self.ca)]

    async def cli(self, peer: Peer, *words: str, seconds: float = 40) -> str:
        process = await asyncio.create_subprocess_exec(
            *CLI, *words, *self._common(peer), "--json", stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT,
            env={**os.environ, "TRIMARAN_PASSWORD": PASSWORD},
        )  # fmt: skip
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise RuntimeError(
                f"{peer.name}: trimaran {' '.join(words)}: no end within {seconds:.0f} s"
            ) from None
        if process.returncode:
            raise RuntimeError(
                f"{peer.name}: trimaran {' '.join(words)}: exit {process.returncode}: {err.decode().strip()}"
            )
        return out.decode()

    # --- hurting ----------------------------------------------------------------------------------

    async def kill(self, peer: Peer) -> None:
        self._silent(peer)
        if peer.alive and peer.process is not None:
            peer.process.kill()
            await peer.process.wait()

    def _silent(self, peer: Peer) -> None:
        if peer.life is not None:
            peer.life.to_ns = self.recorder.now_ns()
            self.recorder.add(peer.life)
            peer.life = None

    async def hurt(self, stop_at_ns: int) -> None:
        """Kill or pause a peer now and then. The seeders of every file stay at least two of which one
        lives: only peers that are not sharing sources are killed."""
        leechers = [
            peer for peer in self.peers.values() if int(peer.name.partition("-")[2]) > len(self.files)
        ]
        while leechers and self.recorder.now_ns() < stop_at_ns:
            await asyncio.sleep(self.random.uniform(3, 8))
            peer = self.random.choice(leechers)
            begin = self.recorder.now_ns()
            if self.random.random() < 0.5:
                await self.kill(peer)
                kind = "peer killed"
                await asyncio.sleep(self.random.uniform(0.5, 3))
            else:
                kind = "peer paused"
                if peer.alive and peer.process is not None:
                    peer.process.send_signal(signal.SIGSTOP)
                    await asyncio.sleep(self.random.uniform(0.5, 4))
                    peer.process.send_signal(signal.SIGCONT)
            await self.start(peer)
            self.recorder.add(
                Fault(kind=kind, target=peer.name, begin_ns=begin, end_ns=self.recorder.now_ns(), bit=True)
            )

    # --- downloading ------------------------------------------------------------------------------

    async def download(self, peer: Peer, name: str, seconds: float) -> Transfer:
        """`get` until it is whole, asking again after every interruption, as a person would."""
        _, digest, size = self.files[name]
        target = self.folder / f"{peer.name}-got"
        target.mkdir(exist_ok=True)
        transfer = Transfer(
            peer=peer.name, group=self.group, name=name, begin_ns=self.recorder.now_ns(), size_bytes=size,
            wanted_sha256=digest, progress=[],
        )  # fmt: skip
        follow = asyncio.create_task(self._follow(peer, name, transfer))
        until = asyncio.get_running_loop().time() + seconds
        try:
            while not transfer.got_sha256 and (left := until - asyncio.get_running_loop().time()) > 0:
                try:
                    await self.cli(peer, "get", f"{self.group}/{name}", "-o", str(target), seconds=left)
                    transfer.exit_code = 0
                    transfer.got_sha256 = await asyncio.to_thread(_sha256, target / name)
                except RuntimeError as error:
                    told = str(error)
                    transfer.exit_code = int(told.split("exit ")[1].split(":")[0]) if "exit " in told else -1
                    await asyncio.sleep(0.5)
        finally:
            follow.cancel()
            transfer.end_ns = self.recorder.now_ns()
            self.recorder.add(transfer)
        return transfer

    async def _follow(self, peer: Peer, name: str, transfer: Transfer) -> None:
        while True:
            await asyncio.sleep(2.0)
            with contextlib.suppress(RuntimeError, ValueError, KeyError):
                rows = json.loads(await self.cli(peer, "ps", seconds=10))
                row = next((row for row in rows if row["name"] == name), None)
                if row:
                    transfer.progress.append((self.recorder.now_ns(), row["done_bytes"]))

    async def observe(self, api: Api, nodes: list[str], stop: asyncio.Event) -> None:
        """Read the swarms, linearizably, again and again."""
        known = {peer.peer_id for peer in self.peers.values()}
        while not stop.is_set():
            for name in self.files:
                call = self.recorder.now_ns()
                reply = await api.call(
                    self.random.choice(nodes), "GET", f"/v1/groups/{self.group}/files/{name}/swarm", seconds=4,
                    query="consistency=linearizable",
                )  # fmt: skip
                if reply.end == "ok":
                    now = self.recorder.now_ns()
                    seen = {row["peer_id"] for row in reply.body["peers"]}
                    shared = {self.peers[p].peer_id for p in self._seeders(name)}
                    for peer_id in known & (shared | seen):
                        self.recorder.add(
                            Presence(at_ns=now, call_ns=call, peer_id=peer_id, seen=peer_id in seen)
                        )
            await asyncio.sleep(0.5)

    def _seeders(self, name: str) -> list[str]:
        number = int(name.partition("-")[2].partition(".")[0])
        return [f"peer-{(number + k) % len(self.peers)}" for k in range(self.seeders_per_file)]

    async def tear_down(self) -> None:
        for peer in self.peers.values():
            self._silent(peer)
            if peer.alive and peer.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    peer.process.send_signal(signal.SIGCONT)
                    peer.process.kill()
                await peer.process.wait()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
