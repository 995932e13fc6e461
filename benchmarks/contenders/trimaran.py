"""Trimaran as its users run it: three trackers, a `peer run` for each host, access checks and verification
on; `share` at the seeders, then `get` at all leechers at once through their sockets."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.contenders.contender import Contender, Run
from benchmarks.hosts import Host
from benchmarks.processes import Process, free_ports, wait_until
from peer import control
from peer.home import Home
from peer.reports import PeerSession, PeerSettings, Progress
from peer.session import open_session

TRIMARAN = [sys.executable, "-m", "trimaran"]
USER, PASSWORD, GROUP, NAME = "bench", "a long enough password", "bench", "it"


class Trimaran(Contender):
    name = "trimaran"
    insecure = True
    algorithm = "sha256"

    @staticmethod
    def missing() -> str | None:
        return None

    def start(self) -> None:
        work = self.work
        self._trackers, self._ca = self._start_trackers(work.tracker)
        hosts = [*work.seeders, *work.leechers]
        self.homes = [work.folder / f"home-{number}" for number in range(len(hosts))]
        for home in self.homes:
            home.mkdir()
        asyncio.run(self._sign_in())
        for home, host in zip(self.homes, hosts, strict=True):
            self.processes.append(self._start_peer(home, host))
        peers = self.processes[1:]
        for process in peers:
            wait_until(
                lambda p=process: b'"peer_id"' in p.log.read_bytes(), 30, "a peer is ready", self.processes
            )  # type: ignore[misc]
        asyncio.run(self.share_all())

    def _start_trackers(self, host: Host) -> tuple[tuple[str, ...], Path | None]:
        folder = self.work.folder / "trackers"
        command = [
            sys.executable, "-m", "benchmarks.trackers", str(folder), host.address, str(free_ports(16)[0]),
            *(["insecure"] if self.insecure else []),
        ]  # fmt: skip
        process = Process(command, self.work.folder / "trackers.log", prefix=host.prefix)
        self.processes.append(process)
        wait_until(lambda: b'"nodes"' in process.log.read_bytes(), 40, "the trackers start", [process])
        told = json.loads(next(line for line in process.log.read_text().splitlines() if '"nodes"' in line))
        return tuple(node["http"] for node in told["nodes"]), Path(told["ca"]) if told.get("ca") else None

    def settings(self, home: Path) -> PeerSettings:
        return PeerSettings(home=home, trackers=self._trackers, ca=self._ca, insecure=self.insecure)

    def _start_peer(self, home: Path, host: Host) -> Process:
        port, far = 0, []
        if self.work.distance and home is self.homes[0]:
            (port,) = free_ports(1)
            scheme = "http" if self.insecure else "https"
            far = ["--advertise", f"{scheme}://{host.address}:{self.far_port(host, port)}"]
        command = [
            *TRIMARAN, "peer", "run", "--home", str(home), "--listen", f"{host.address}:{port}", *far,
            "--trackers", ",".join(self._trackers), *(["--insecure"] if self.insecure else ["--ca", str(self._ca)]), "--json",
        ]  # fmt: skip
        return Process(command, home.with_suffix(".log"), prefix=host.prefix)

    async def _sign_in(self) -> None:
        """One user on all peers. The trackers may lie in another network namespace than this process, so
        that the command runs where its peer will."""
        hosts = [*self.work.seeders, *self.work.leechers]
        await self._command(hosts[0], self.homes[0], "register", USER)
        await self._command(hosts[0], self.homes[0], "group", "create", GROUP)
        for host, home in zip(hosts[1:], self.homes[1:], strict=True):
            await self._command(host, home, "login", USER)

    async def _command(self, host: Host, home: Path, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *host.prefix, *TRIMARAN, *words, "--home", str(home), "--trackers", ",".join(self._trackers),
            *(["--insecure"] if self.insecure else ["--ca", str(self._ca)]), "--json",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env={**os.environ, "TRIMARAN_PASSWORD": PASSWORD},
        )  # fmt: skip
        said, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"trimaran {' '.join(words)}: {said.decode()}")

    async def share_all(self) -> None:
        work = self.work
        sessions = [await open_session(self.settings(home)) for home in self.homes[: len(work.seeders)]]
        for session in sessions:
            assert session.remote, "the benchmark's peer does not run"
            await session.share(
                work.source, GROUP, NAME, replace=False, algorithm=self.algorithm, on_progress=ignore
            )
        for session in sessions:
            await session.close()

    def go(self) -> Run:
        before = self.cpu_seconds()
        times = asyncio.run(self.get_all())
        cpu = self.cpu_seconds() - before
        blocked = max(asyncio.run(_blocked(home)) for home in self.homes)
        peak = max(process.peak_bytes() for process in self.processes[1:])
        return Run(max(times), min(times), cpu, peak, {"blocked_ms": 1000 * blocked})

    async def get_all(self) -> list[float]:
        work = self.work
        sessions = [await open_session(self.settings(home)) for home in self.homes[len(work.seeders) :]]
        begun = time.monotonic()

        async def get(session: PeerSession, number: int) -> float:
            folder = work.folder / f"leecher-{number}"
            folder.mkdir(exist_ok=True)
            await session.get(
                GROUP, NAME, folder, down_bytes_per_second=0, checksum=False, on_progress=ignore
            )
            return time.monotonic() - begun

        try:
            async with asyncio.timeout(work.seconds_max):
                return await asyncio.gather(
                    *(get(session, number) for number, session in enumerate(sessions))
                )
        finally:
            for session in sessions:
                await session.close()

    def targets(self) -> list[Path]:
        return [self.work.folder / f"leecher-{i}" / NAME for i in range(len(self.work.leechers))]


class TrimaranBlake3(Trimaran):
    name = "trimaran blake3"
    algorithm = "blake3"


class TrimaranTls(Trimaran):
    name = "trimaran TLS"
    insecure = False


async def _blocked(home: Path) -> float:
    """For how long a peer's event loop stood still at most, as the peer itself has it."""
    return float(await control.call(Home(home).socket, "blocked", {}, float, None))


def ignore(_: Progress) -> None:
    return
