"""rsync from a local daemon to a fresh target: the folder benchmark's measure."""

from __future__ import annotations

import shutil
import subprocess
import time

from benchmarks.contenders.contender import Contender, Run
from benchmarks.processes import Process, free_ports


class Rsync(Contender):
    name = "rsync"

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("rsync") else "rsync is not installed (Debian: rsync)"

    def start(self) -> None:
        work = self.work
        host = work.seeders[0]
        port = free_ports(1)[0]
        configuration = work.folder / "rsyncd.conf"
        configuration.write_text(
            f"address = {host.address}\nport = {port}\nuse chroot = no\nuid = 0\ngid = 0\n[it]\npath = {work.source.parent}\nread only = yes\n"
        )
        self.url = f"rsync://{host.address}:{port}/it/{work.source.name}"
        self.processes.append(
            Process(
                ["rsync", "--daemon", "--no-detach", f"--config={configuration}"],
                work.folder / "rsyncd.log",
                prefix=host.prefix,
            )
        )
        (work.folder / "leecher-0").mkdir()
        time.sleep(0.5)  # rsync's daemon says nothing when it listens

    def go(self) -> Run:
        work = self.work
        before = self.cpu_seconds()
        target = work.folder / "leecher-0"
        script = f'rsync -a "{self.url}" "{target}/"; cat /proc/$$/stat'
        begun = time.monotonic()
        done = subprocess.run(
            [*work.leechers[0].prefix, "sh", "-c", script], capture_output=True, text=True, check=True
        )
        seconds = time.monotonic() - begun
        fields = done.stdout.rpartition(")")[2].split()
        cpu = sum(int(field) for field in fields[11:15]) / 100
        return Run(seconds, seconds, self.cpu_seconds() - before + cpu, self.peak_bytes())
