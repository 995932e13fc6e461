"""Many small files, each handed over by itself, one after the other: what a call costs, not what a byte costs.

Trimaran shares and fetches each (a manifest, a publication that three nodes agree on, an announcement, a download);
curl and rsync fetch each from a server that has them already.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from benchmarks.contenders.contender import Run
from benchmarks.contenders.rsync import Rsync
from benchmarks.contenders.trimaran import GROUP, Trimaran, ignore
from benchmarks.contenders.web import Curl
from peer.session import open_session


class TrimaranOneByOne(Trimaran):
    async def share_all(self) -> None:
        """Nothing is shared beforehand."""

    async def get_all(self) -> list[float]:
        work = self.work
        giver, taker = [await open_session(self.settings(home)) for home in self.homes]
        begun = time.monotonic()
        for path in files_of(work.source):
            name = "-".join(path.relative_to(work.source).parts)
            await giver.share(path, GROUP, name, replace=False, algorithm="sha256", on_progress=ignore)
            folder = work.folder / "leecher-0" / work.source.name / path.relative_to(work.source).parent
            folder.mkdir(parents=True, exist_ok=True)
            await taker.get(GROUP, name, folder, down_bytes_per_second=0, checksum=False, on_progress=ignore)
            (folder / name).rename(folder / path.name)
        seconds = time.monotonic() - begun
        for session in (giver, taker):
            await session.close()
        return [seconds]

    def targets(self) -> list[Path]:
        return [self.work.folder / "leecher-0" / self.work.source.name]


class CurlOneByOne(Curl):
    def go(self) -> Run:
        work, target = self.work, self.targets()[0]
        script = "".join(
            f'curl -sf --create-dirs -o "{target / path.relative_to(work.source)}" '
            f'"{self.web.url}/{path.relative_to(work.source.parent)}" && '
            f'sha256sum "{target / path.relative_to(work.source)}" >/dev/null\n'
            for path in files_of(work.source)
        )
        return timed_script(self, script)


class RsyncOneByOne(Rsync):
    def go(self) -> Run:
        work, target = self.work, self.targets()[0]
        script = "".join(
            f'mkdir -p "{(target / path.relative_to(work.source)).parent}"; '
            f'rsync -a "{self.url}/{path.relative_to(work.source)}" "{target / path.relative_to(work.source)}"\n'
            for path in files_of(work.source)
        )
        return timed_script(self, script)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def timed_script(contender: Curl | Rsync, script: str) -> Run:
    """Run it in a shell beside the leecher, and count what it used."""
    before = contender.cpu_seconds()
    begun = time.monotonic()
    done = subprocess.run(
        [*contender.work.leechers[0].prefix, "sh", "-e"],
        input=script + "cat /proc/$$/stat\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    cpu = sum(int(field) for field in done.stdout.rpartition(")")[2].split()[11:15]) / 100
    return Run(seconds, seconds, contender.cpu_seconds() - before + cpu, contender.peak_bytes())
