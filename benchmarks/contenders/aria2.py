"""aria2: BitTorrent among the hosts, and Metalink with piece hashes from a web server (one to one only)."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from pathlib import Path

from benchmarks.contenders import bittorrent
from benchmarks.contenders.contender import Contender, Run
from benchmarks.contenders.web import WebServer
from benchmarks.processes import Process, free_ports, wait_until

TRACKER = Path(__file__).with_name("announce_tracker.py")
QUIET = ["--no-conf", "-q", "--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false", "--disable-ipv6=true",
         "--summary-interval=0", "--allow-overwrite=true", "--disk-cache=64M", "--file-allocation=none"]  # fmt: skip


def absent() -> str | None:
    return None if shutil.which("aria2c") else "aria2 is not installed (Debian: aria2)"


class Aria2(Contender):
    """BitTorrent, with a small tracker of ours that only introduces peers."""

    name = "aria2"

    @staticmethod
    def missing() -> str | None:
        return absent() or bittorrent.Libtorrent.missing()  # its torrents are made with libtorrent

    def start(self) -> None:
        work = self.work
        torrent = work.folder / "it.torrent"
        bittorrent.make_torrent(work.source, torrent, bittorrent.piece_bytes(work.size_bytes))
        ports = free_ports(1 + len(work.seeders) + len(work.leechers))
        self._tracker = Process(
            [sys.executable, str(TRACKER), work.tracker.address, str(ports[0])], work.folder / "announce.log",
            prefix=work.tracker.prefix,
        )  # fmt: skip
        self._announce = f"http://{work.tracker.address}:{ports[0]}/announce"
        self._torrent, self._ports = torrent, ports[1:]
        self._hook = work.folder / "hook.sh"
        self._hook.write_text('#!/bin/sh\ntouch "$(dirname "$3")/.done"\n')
        self._hook.chmod(0o755)
        wait_until(
            lambda: b"ready" in self._tracker.log.read_bytes(), 10, "the announce tracker", [self._tracker]
        )
        for number, host in enumerate(work.seeders):
            self._run(
                number,
                host.address,
                host.prefix,
                work.source.parent,
                ["--bt-seed-unverified=true", "--check-integrity=false"],
            )
        time.sleep(2.0)  # aria2 tells nobody when it seeds; its announce interval is the only sign

    def _run(self, number: int, address: str, prefix: tuple[str, ...], folder: Path, more: list[str]) -> None:
        command = [
            "aria2c", *QUIET, "--enable-peer-exchange=false", f"--listen-port={self._ports[number]}", "--seed-ratio=0.0",
            "--bt-max-peers=0", "--bt-tracker-interval=2", f"--bt-tracker={self._announce}", f"--bt-external-ip={address}",
            "--max-overall-upload-limit=0", "--bt-request-peer-speed-limit=1000M", "-d", str(folder), *more, str(self._torrent),
        ]  # fmt: skip
        self.processes.append(Process(command, self.work.folder / f"node-{number}.log", prefix=prefix))

    def go(self) -> Run:
        work = self.work
        folders = [work.folder / f"leecher-{i}" for i in range(len(work.leechers))]
        for folder in folders:
            folder.mkdir()
        before = self.cpu_seconds()
        begun = time.monotonic()
        for i, host in enumerate(work.leechers):
            self._run(
                len(work.seeders) + i,
                host.address,
                host.prefix,
                folders[i],
                [f"--on-bt-download-complete={self._hook}"],
            )
        # A folder's hook is told the path of its first file, which may lie deeper.
        times: dict[Path, float] = {}
        while len(times) < len(folders):
            for folder in folders:
                if folder not in times and next(folder.rglob(".done"), None):
                    times[folder] = time.monotonic() - begun
            if time.monotonic() - begun > work.seconds_max:
                raise TimeoutError(f"aria2: {len(times)} of {len(folders)} done")
            time.sleep(0.005)
        return Run(max(times.values()), min(times.values()), self.cpu_seconds() - before, self.peak_bytes())

    def stop(self) -> None:
        super().stop()
        if hasattr(self, "_tracker"):
            self._tracker.kill()


class Aria2Metalink(Contender):
    """HTTP from nginx, checked by the piece hashes of a Metalink (RFC 5854)."""

    name = "aria2 metalink"
    PIECE = 1 << 20

    @staticmethod
    def missing() -> str | None:
        return absent() or WebServer.missing()

    def start(self) -> None:
        work = self.work
        self._web = WebServer(work.source.parent, work.folder, work.seeders[0])
        self.processes.append(self._web.process)
        hashes = []
        with work.source.open("rb") as file:
            while data := file.read(self.PIECE):
                hashes.append(f"<hash>{hashlib.sha256(data).hexdigest()}</hash>")
        url = f"{self._web.url}/{work.source.name}"
        (work.folder / "it.meta4").write_text(
            '<?xml version="1.0" encoding="UTF-8"?><metalink xmlns="urn:ietf:params:xml:ns:metalink">'
            f'<file name="{work.source.name}"><size>{work.size_bytes}</size><pieces length="{self.PIECE}" type="sha-256">'
            f"{''.join(hashes)}</pieces>" + f"<url>{url}</url>" * 4 + "</file></metalink>"
        )

    def go(self) -> Run:
        work = self.work
        target = work.folder / "leecher-0"
        target.mkdir()
        before = self.cpu_seconds()
        command = [
            "aria2c",
            *QUIET,
            "-x4",
            "-s4",
            "-k",
            "1M",
            "--check-integrity=true",
            "-d",
            str(target),
            str(work.folder / "it.meta4"),
        ]
        begun = time.monotonic()
        process = Process(command, work.folder / "aria2.log", prefix=work.leechers[0].prefix)
        peak = 0
        while process.child.poll() is None:
            peak = max(peak, process.peak_bytes())
            used = process.cpu_seconds() or 0.0
            if used:
                last_used = used
            time.sleep(0.005)
        seconds = time.monotonic() - begun
        if process.child.returncode:
            raise RuntimeError(f"aria2 failed: {process.tail()}")
        return Run(seconds, seconds, self.cpu_seconds() - before + last_used, max(peak, self.peak_bytes()))
