"""`trimaran demo`: the main job on a real file, on this machine, with nodes lost on the way.

Owned here: the story and its measurements. Every part of it is the product itself: tracker and peer processes
started by their commands, and the calls that the commands make. Left to others: starting and ending processes
(`processes.py`), how things look (`output.py`, `progress.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.api.types import StatusAnswer
from peer.reports import Exit, GetReport, PeerSession, Progress, TrimaranError

from .output import Output, counted, harmless, rated, sized
from .processes import Started, free_base_port
from .progress import Display
from .settings import Common
from .wiring import peer_session, signed_in, trackers

GROUP = "crew"
PEOPLE = ("ana", "ben", "cho")
DOWNLOAD_SECONDS = 9.0
LEADER_DIES_AT, SEEDER_DIES_AT = 0.30, 0.60
SECRET_BYTES = 48 << 20
SECRET_RATE = 4 << 20
REFUSED_SECONDS_MAX = 10.0


async def run(*, file: str, keep: bool, kill: bool, picture: str, common: Common) -> int:
    folder = Path(tempfile.mkdtemp(prefix="trimaran-demo-"))
    out = Output.of(common)
    teller = Teller(out, record=bool(picture))
    demo = Demo(folder, teller, quiet=common.quiet, kill=kill)
    try:
        document = await demo.play(Path(file).expanduser().absolute() if file else None)
        teller.tell("Stopping everything that was started.")
    finally:
        await demo.stop()
        if keep:
            out.note(f"All logs and files are kept in {folder}.")
        else:
            await asyncio.to_thread(shutil.rmtree, folder, True)
    teller.close(document["equal"])
    if picture:
        teller.draw(Path(picture))
    if out.json:
        out.answer(document, "")
    if not document["equal"]:
        raise TrimaranError(
            "The copy is not equal to the source.",
            exit_code=Exit.INTEGRITY,
            code="integrity",
            hint="Run it again with --keep and report the folder.",
        )
    return Exit.DONE


class Teller:
    """Says what happens, with the seconds since the start."""

    def __init__(self, out: Output, *, record: bool) -> None:
        import sys

        from rich.console import Console

        self._began = time.monotonic()
        stream = sys.stderr if out.json else sys.stdout
        self._console = Console(
            file=stream,
            record=record,
            highlight=False,
            quiet=out.json and out.quiet,
            width=110 if record or not stream.isatty() else None,
        )

    def tell(self, text: str, style: str = "") -> None:
        from rich.text import Text

        stamp = f"{time.monotonic() - self._began:5.1f} s  "
        lines = text.split("\n")
        self._console.print(Text(stamp, "bright_black").append(harmless(lines[0]), style), soft_wrap=True)
        for line in lines[1:]:
            self._console.print(Text(" " * len(stamp)).append(harmless(line), style), soft_wrap=True)

    def close(self, equal: bool) -> None:
        seconds = time.monotonic() - self._began
        self._console.print(
            f"[bold green]Done in {seconds:.0f} s: the copy is whole.[/]"
            if equal
            else f"[bold red]Done in {seconds:.0f} s: the copy is WRONG.[/]"
        )

    def draw(self, path: Path) -> None:
        self._console.save_svg(str(path), title="trimaran demo")


@dataclass
class Demo:
    folder: Path
    teller: Teller
    quiet: bool
    kill: bool
    started: list[Started] = field(default_factory=list)
    peers: dict[str, Started] = field(default_factory=dict)
    cluster: list[dict[str, Any]] = field(default_factory=list)
    lost: dict[str, Any] = field(default_factory=dict)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    async def play(self, given: Path | None) -> dict[str, Any]:
        source, _ = await asyncio.gather(self.source(given), self.start_cluster())
        await self.start_peers()
        await self.make_group()
        size_bytes = await self.share(source)
        report = await self.download(source.name, size_bytes)
        equal, sums = await self.compare(source, Path(report.path))
        refused_seconds = await self.revoke()
        return {
            "path": str(source),
            "size_bytes": size_bytes,
            "sha256_source": sums[0],
            "sha256_copy": sums[1],
            "equal": equal,
            "seconds": report.seconds,
            "received_bytes": report.received_bytes,
            "sources": report.sources,
            "refused_after_kick_seconds": refused_seconds,
            **self.lost,
        }

    async def source(self, given: Path | None) -> Path:
        if given is not None:
            if not given.exists():
                raise TrimaranError(
                    f"There is no {given}.",
                    exit_code=Exit.NOT_FOUND,
                    code="no-such-path",
                    hint="Check --file.",
                )
            return given
        return await asyncio.to_thread(_library_as_one_file, self.folder / "python-library.tar")

    async def start_cluster(self) -> None:
        data = self.folder / "trackers"
        port = free_base_port(17000 + os.getpid() % 1000 * 10)
        local = await self._started(
            "tracker",
            "local",
            "--nodes",
            "3",
            "--data-dir",
            str(data),
            "--base-port",
            str(port),
            log="trackers",
        )
        self.cluster = local.ready["nodes"]
        self.ca = str(local.ready["ca"] or "")
        status = await self._status()
        self.teller.tell(
            f"Three trackers run on this machine, and {status.leader} leads:\n"
            + "\n".join(f"{node['id']}  {node['http']}  process {node['pid']}" for node in self.cluster)
        )

    async def start_peers(self) -> None:
        async def one(user: str) -> None:
            home = self.folder / user
            password = os.urandom(12).hex()
            async with self._session(user) as session:
                await session.register(user, password)
                await session.login(user, password)
            self.peers[user] = await self._started(
                "peer",
                "run",
                "--home",
                str(home),
                "--listen",
                "127.0.0.1:0",
                log=user,
                settings=self._settings(),
            )

        await asyncio.gather(*(one(user) for user in PEOPLE))
        who = "\n".join(
            f"{user}  {self.peers[user].ready['listen']}  process {self.peers[user].pid}" for user in PEOPLE
        )
        self.teller.tell(f"Three peers, each with a home and a user of its own:\n{who}")

    async def make_group(self) -> None:
        async with signed_in(self._common("ana")) as ana:
            await ana.trackers.create_group(GROUP)
            for user in PEOPLE[1:]:
                async with signed_in(self._common(user)) as other:
                    await other.trackers.request_join(GROUP)
                await ana.trackers.put_member(GROUP, user, "accept")
        self.teller.tell(f"ana made the group {GROUP}, and let ben and cho in.")

    async def share(self, source: Path) -> int:
        async def one(user: str, display: Display) -> int:
            async with self._session(user) as session:
                report = await session.share(
                    source, GROUP, source.name, replace=False, algorithm=None, on_progress=display.update
                )
                return report.size_bytes

        with Display(quiet=self.quiet) as display:
            size_bytes = await one("ana", display)
            await one("ben", display)
        self.teller.tell(f"ana and ben share {source.name}, {sized(size_bytes)}.")
        return size_bytes

    async def download(self, name: str, size_bytes: int) -> GetReport:
        rate = max(1 << 16, int(size_bytes / DOWNLOAD_SECONDS))
        self.teller.tell(f"cho downloads it, held to {rated(rate)} so that there is a middle.")
        due: list[tuple[float, Callable[[], Awaitable[None]]]] = (
            [(LEADER_DIES_AT, self._kill_leader), (SEEDER_DIES_AT, self._kill_seeder)] if self.kill else []
        )
        with Display(quiet=self.quiet) as display:

            def look(progress: Progress) -> None:
                display.update(progress)
                while due and size_bytes and progress.done_bytes >= due[0][0] * size_bytes:
                    self._meanwhile(due.pop(0)[1]())

            async with self._session("cho") as session:
                report = await session.get(
                    GROUP,
                    name,
                    self._downloads(),
                    down_bytes_per_second=rate,
                    checksum=False,
                    on_progress=look,
                )
        await asyncio.gather(*self.background)
        if due:
            self.teller.tell(
                "The file was so small that it was complete before anything could be killed.", "yellow"
            )
        self.teller.tell(
            f"Complete: {sized(report.received_bytes)} in {report.seconds:.1f} s, every piece verified. Sources:\n"
            + "\n".join(
                f"{each.user or each.peer_id[:12]}  {sized(each.bytes)}  {counted(each.pieces, 'piece')}"
                f"  {each.bytes / max(1, report.received_bytes):.0%}"
                for each in sorted(report.sources, key=lambda each: -each.bytes)
            )
        )
        return report

    async def compare(self, source: Path, copy: Path) -> tuple[bool, tuple[str, str]]:
        sums = await asyncio.to_thread(_sum, source), await asyncio.to_thread(_sum, copy)
        equal = sums[0] == sums[1]
        self.teller.tell(
            f"sha256 of ana's file  {sums[0]}\nsha256 of cho's copy  {sums[1]}", "green" if equal else "red"
        )
        return equal, sums

    async def revoke(self) -> float:
        """Remove cho in the middle of a download. Answers the seconds from `kick` to cho's last byte."""
        secret = self.folder / "secret.bin"
        await asyncio.to_thread(_random_file, secret, SECRET_BYTES)
        async with self._session("ana") as session:
            await session.share(secret, GROUP, None, replace=False, algorithm=None, on_progress=_ignore)
        under_way = asyncio.Event()
        seen = {"bytes": 0, "at": 0.0}

        def look(progress: Progress) -> None:
            if progress.done_bytes > seen["bytes"]:
                seen.update(bytes=progress.done_bytes, at=time.monotonic())
            if progress.done_bytes >= SECRET_BYTES // 12:
                under_way.set()

        async def fetch() -> None:
            async with self._session("cho") as session:
                await session.get(
                    GROUP,
                    secret.name,
                    self._downloads(),
                    down_bytes_per_second=SECRET_RATE,
                    checksum=False,
                    on_progress=look,
                )

        fetching = asyncio.create_task(fetch())
        watching = asyncio.create_task(under_way.wait())
        await asyncio.wait({fetching, watching}, return_when=asyncio.FIRST_COMPLETED)
        watching.cancel()
        async with signed_in(self._common("ana")) as ana:
            await ana.trackers.remove_member(GROUP, "cho")
        kicked_at = time.monotonic()
        self.teller.tell("ana removes cho from the group while cho downloads another file from ana.")
        try:
            async with asyncio.timeout(REFUSED_SECONDS_MAX):
                await fetching
            reason = None
        except TrimaranError as error:
            reason = error.message
        except TimeoutError:
            reason = "The download got nothing any more."
        seconds = max(0.0, seen["at"] - kicked_at)
        if reason is None or seconds > REFUSED_SECONDS_MAX / 2:
            raise TrimaranError(
                "The seeder went on serving a removed member.", exit_code=Exit.UNEXPECTED, code="not-refused"
            )
        self.teller.tell(
            f"The last byte came {seconds:.1f} s after that, at {seen['bytes'] / SECRET_BYTES:.0%}. cho is told:\n{reason}"
        )
        return seconds

    async def _kill_leader(self) -> None:
        status = await self._status()
        leader = next(node for node in self.cluster if node["id"] == status.leader)
        os.kill(leader["pid"], signal.SIGKILL)
        killed_at = time.monotonic()
        self.teller.tell(f"kill -9 of {leader['id']}, the leader. The download goes on.", "red")
        self.lost["leader_killed"] = leader["id"]
        while True:
            with suppress(TrimaranError):
                now = await self._status()
                if now.quorum and now.leader not in (None, leader["id"]):
                    break
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - killed_at
        self.lost |= {"new_leader": now.leader, "new_leader_seconds": seconds}
        self.teller.tell(f"{now.leader} leads {seconds:.1f} s later, with a majority of two.", "green")

    async def _kill_seeder(self) -> None:
        self.peers["ben"].kill()
        self.lost["seeder_killed"] = "ben"
        self.teller.tell("kill -9 of ben, a seeder. What ben was sending comes from ana.", "red")

    # --- small steps ------------------------------------------------------------------------------

    async def _started(self, *argv: str, log: str, settings: dict[str, str] | None = None) -> Started:
        started = Started(*argv, log=self.folder / f"{log}.log", settings=settings)
        self.started.append(started)
        await asyncio.to_thread(started.wait_until_ready)
        return started

    async def stop(self) -> None:
        """End everything that was started, peers first."""
        for task in self.background:
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in self.started[1:]))
        for cluster in self.started[:1]:
            await asyncio.to_thread(cluster.stop)

    async def _status(self) -> StatusAnswer:
        from cluster.api.errors import TrackerError
        from peer.trouble import of_tracker

        try:
            async with trackers(self._common("ana")) as client:
                return await client.within(10.0).status()
        except TrackerError as error:
            raise of_tracker(error) from error

    def _session(self, user: str) -> AbstractAsyncContextManager[PeerSession]:
        return peer_session(self._common(user))

    def _common(self, user: str) -> Common:
        return Common(home=str(self.folder / user), **self._cluster_options())

    def _cluster_options(self) -> dict[str, Any]:
        urls = ",".join(node["http"] for node in self.cluster)
        return {"trackers": urls, "ca": self.ca, "insecure": urls.startswith("http:")}

    def _settings(self) -> dict[str, str]:
        options = self._cluster_options()
        found = {"TRIMARAN_TRACKERS": options["trackers"], "TRIMARAN_CA": options["ca"]}
        return found | ({"TRIMARAN_INSECURE": "1"} if options["insecure"] else {})

    def _downloads(self) -> Path:
        folder = self.folder / "downloads-of-cho"
        folder.mkdir(exist_ok=True)
        return folder

    def _meanwhile(self, work: Awaitable[None]) -> None:
        async def done() -> None:
            await work

        self.background.add(asyncio.create_task(done()))


def _ignore(_progress: Progress) -> None:
    pass


def _library_as_one_file(path: Path) -> Path:
    """Something real that every machine has: Python's own library, as one file."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(entry.name).parts
        return (
            None if "site-packages" in parts or "__pycache__" in parts or "dist-packages" in parts else entry
        )

    with tarfile.open(path, "w") as tar:
        tar.add(sysconfig.get_path("stdlib"), arcname="python-library", filter=wanted)
    return path


def _random_file(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))


def _sum(path: Path) -> str:
    """SHA-256 of a file; of a folder, over its paths and its files' sums in order."""
    if path.is_dir():
        whole = hashlib.sha256()
        for each in sorted(path.rglob("*")):
            whole.update(each.relative_to(path).as_posix().encode("utf-8", "surrogateescape") + b"\0")
            if each.is_file():
                whole.update(_sum(each).encode())
        return whole.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
