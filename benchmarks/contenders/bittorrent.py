"""libtorrent, tuned: `libtorrent_node.py` under the interpreter that has its bindings."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contenders.contender import Contender, Run
from benchmarks.processes import Process, free_ports, wait_until

NODE = Path(__file__).with_name("libtorrent_node.py")
MAKE = """
import sys, libtorrent as lt
source, out, piece = sys.argv[1], sys.argv[2], int(sys.argv[3])
import os
files = lt.file_storage()
lt.add_files(files, source)
torrent = lt.create_torrent(files, piece, 64)
lt.set_piece_hashes(torrent, os.path.dirname(source))
open(out, 'wb').write(lt.bencode(torrent.generate()))
"""


@functools.cache
def interpreter() -> str | None:
    """The first interpreter with libtorrent's bindings: `make bench`'s own environment (PyPI's newest),
    this one, or Debian's."""
    own = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
    for python in (str(own), sys.executable, "/usr/bin/python3"):
        try:
            if (
                subprocess.run(
                    [python, "-W", "ignore", "-c", "import libtorrent"], capture_output=True, check=False
                ).returncode
                == 0
            ):
                return python
        except OSError:
            continue
    return None


def piece_bytes(size_bytes: int) -> int:
    """What did best here: 1 MiB where the CPU is the limit, 256 KiB for small swarms."""
    return 1 << 20 if size_bytes >= 200 << 20 else 1 << 18


def make_torrent(source: Path, out: Path, piece: int) -> None:
    python = interpreter()
    assert python
    subprocess.run(
        [python, "-W", "ignore", "-c", MAKE, str(source), str(out), str(piece)],
        check=True,
        capture_output=True,
    )


class Libtorrent(Contender):
    name = "libtorrent"

    @staticmethod
    def missing() -> str | None:
        return (
            None
            if interpreter()
            else "libtorrent is not installed (PyPI: libtorrent; Debian: python3-libtorrent)"
        )

    def start(self) -> None:
        work = self.work
        torrent = work.folder / "it.torrent"
        make_torrent(work.source, torrent, piece_bytes(work.size_bytes))
        hosts = [*work.seeders, *work.leechers]
        ports = free_ports(len(hosts))
        addresses = [f"{host.address}:{port}" for host, port in zip(hosts, ports, strict=True)]
        far = f"{hosts[0].address}:{self.far_port(hosts[0], ports[0])}" if work.distance else ""
        self._go = work.folder / "go"
        self._done = []
        python = interpreter()
        assert python
        for number, host in enumerate(hosts):
            seeding = number < len(work.seeders)
            folder = work.source.parent if seeding else work.folder / f"leecher-{number - len(work.seeders)}"
            folder.mkdir(exist_ok=True)
            done = work.folder / f"done-{number}"
            reached = [far, *addresses[1:]] if far else addresses
            others = ",".join(address for index, address in enumerate(reached) if index != number)
            command = [
                python, "-W", "ignore", str(NODE), "seed" if seeding else "leech", str(torrent), str(folder),
                addresses[number], others, str(self._go), str(done),
            ]  # fmt: skip
            self.processes.append(Process(command, work.folder / f"node-{number}.log", prefix=host.prefix))
            if not seeding:
                self._done.append(done)
        for number in range(len(hosts)):
            wait_until(
                (work.folder / f"done-{number}.ready").exists, 30, "libtorrent is ready", self.processes
            )

    def go(self) -> Run:
        before = self.cpu_seconds()
        begun = time.monotonic()
        self._go.touch()
        times: dict[Path, float] = {}
        while len(times) < len(self._done):
            for path in self._done:
                if path not in times and path.exists():
                    times[path] = time.monotonic() - begun
            if time.monotonic() - begun > self.work.seconds_max:
                raise TimeoutError(f"libtorrent: {len(times)} of {len(self._done)} done")
            time.sleep(0.002)
        return Run(max(times.values()), min(times.values()), self.cpu_seconds() - before, self.peak_bytes())
