"""What every contender of a swarm benchmark does: get ready, go, tell.

Everything that is not the transfer (starting programs, making torrents, hashing what is shared) happens in
`start`, untimed; `go` starts all downloads at once and returns when the last has all bytes on disk, verified.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hosts import Host
from benchmarks.processes import Process, free_ports, wait_until


@dataclass(frozen=True)
class Distance:
    """A long link before the first seeder (`benchmarks/distance.py`)."""

    round_trip_seconds: float
    bytes_per_second: int


@dataclass
class Work:
    """What is to be moved, from whom to whom."""

    source: Path  # a file or a folder
    size_bytes: int
    folder: Path  # a fresh one for this run
    seeders: Sequence[Host]
    leechers: Sequence[Host]
    tracker: Host
    seconds_max: float = 180.0
    distance: Distance | None = None


@dataclass
class Run:
    last_seconds: float
    first_seconds: float
    cpu_seconds: float  # all sides together, during the transfer
    peak_bytes: int  # of the largest process
    notes: dict[str, float] = field(default_factory=dict)


class Contender(ABC):
    """One program (or one way of running it). A new object for each run."""

    name: str

    def __init__(self, work: Work) -> None:
        self.work = work
        self.processes: list[Process] = []
        self.beside: list[Process] = []  # not measured: what only makes the place

    @staticmethod
    @abstractmethod
    def missing() -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def go(self) -> Run: ...

    def targets(self) -> list[Path]:
        """Where each leecher's result lies, for the comparison after the run."""
        return [
            self.work.folder / f"leecher-{i}" / self.work.source.name for i in range(len(self.work.leechers))
        ]

    def stop(self) -> None:
        for process in [*self.processes, *self.beside]:
            process.kill()

    def far_port(self, host: Host, port: int) -> int:
        """The port behind which `port` of the host lies at the work's distance."""
        distance = self.work.distance
        assert distance is not None
        (near,) = free_ports(1)
        proxy = Process(
            [sys.executable, "-m", "benchmarks.distance", host.address, str(near), host.address, str(port),
             str(distance.round_trip_seconds), str(distance.bytes_per_second)],
            self.work.folder / "distance.log", prefix=host.prefix,
        )  # fmt: skip
        self.beside.append(proxy)
        wait_until(lambda: b"ready" in proxy.log.read_bytes(), 10, "the long link", [proxy])
        return near

    def cpu_seconds(self) -> float:
        return sum(process.cpu_seconds() for process in self.processes)

    def peak_bytes(self) -> int:
        return max((process.peak_bytes() for process in self.processes), default=0)
