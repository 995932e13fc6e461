"""Trimaran as its users run it: three trackers, a `peer run` for each host, access checks and verification
on; `share` at the seeders, then `get` at all leechers at once through their sockets."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from peer.session import open_session

from benchmarks.contenders.contender import Contender, Run
from benchmarks.hosts import Host
from benchmarks.processes import Process, free_ports, wait_until
from peer.reports import PeerSession, PeerSettings, Progress

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
        self._homes = [work.folder / f"home-{number}" for number in range(len(hosts))]
        for home, host in zip(self._homes, hosts, strict=True):
            self.processes.append(self._start_peer(home, host))
        peers = self.processes[1:]
        for process in peers:
            wait_until(
                lambda p=process: b'"peer_id"' in p.log.read_bytes(), 30, "a peer is ready", self.processes
            )  # type: ignore[misc]
        asyncio.run(self._prepare())

    def _start_trackers(self, host: Host) -> tuple[tuple[str, ...], Path | None]:
        folder = self.work.folder / "trackers"
        command = [
            *TRIMARAN, "tracker", "local", "--nodes", "3", "--data-dir", str(folder), "--base-port", str(free_ports(1)[0]),
            "--host", host.address, *(["--insecure"] if self.insecure else []), "--json",
        ]  # fmt: skip
        process = Process(command, self.work.folder / "trackers.log", prefix=host.prefix)
        self.processes.append(process)
        wait_until(lambda: b'"nodes"' in process.log.read_bytes(), 40, "the trackers start", [process])
        told = json.loads(next(line for line in process.log.read_text().splitlines() if '"nodes"' in line))
        return tuple(node["http"] for node in told["nodes"]), Path(told["ca"]) if told.get("ca") else None

    def _settings(self, home: Path) -> PeerSettings:
        return PeerSettings(home=home, trackers=self._trackers, ca=self._ca, insecure=self.insecure)

    def _start_peer(self, home: Path, host: Host) -> Process:
        home.mkdir()
        command = [
            *TRIMARAN, "peer", "run", "--home", str(home), "--listen", f"{host.address}:0",
            "--trackers", ",".join(self._trackers), *(["--insecure"] if self.insecure else ["--ca", str(self._ca)]), "--json",
        ]  # fmt: skip
        return Process(command, home.with_suffix(".log"), prefix=host.prefix)

    async def _prepare(self) -> None:
        work = self.work
        first = await open_session(self._settings(self._homes[0]))
        await first.register(USER, PASSWORD)
        await first.close()
        sessions = [await open_session(self._settings(home)) for home in self._homes]
        for session in sessions:
            assert session.remote, "the benchmark's peer does not run"
            await session.login(USER, PASSWORD)
        done = await asyncio.create_subprocess_exec(
            *TRIMARAN, "group", "create", GROUP, "--home", str(self._homes[0]), "--trackers", ",".join(self._trackers),
            *(["--insecure"] if self.insecure else ["--ca", str(self._ca)]), "--json",
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert await done.wait() == 0, "the group could not be made"
        for session in sessions[: len(work.seeders)]:
            await session.share(
                work.source, GROUP, NAME, replace=False, algorithm=self.algorithm, on_progress=_ignore
            )
        for session in sessions:
            await session.close()

    def go(self) -> Run:
        before = self.cpu_seconds()
        times = asyncio.run(self._get_all())
        cpu = self.cpu_seconds() - before
        return Run(max(times), min(times), cpu, max(p.peak_bytes() for p in self.processes[1:]))

    async def _get_all(self) -> list[float]:
        work = self.work
        sessions = [await open_session(self._settings(home)) for home in self._homes[len(work.seeders) :]]
        begun = time.monotonic()

        async def get(session: PeerSession, number: int) -> float:
            folder = work.folder / f"leecher-{number}"
            folder.mkdir(exist_ok=True)
            await session.get(
                GROUP, NAME, folder, down_bytes_per_second=0, checksum=False, on_progress=_ignore
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


def _ignore(_: Progress) -> None:
    return
