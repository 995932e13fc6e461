"""What every contender of a swarm benchmark does: get ready, go, tell.

Everything that is not the transfer (starting programs, making torrents, hashing what is shared) happens in
`start`, untimed; `go` starts all downloads at once and returns when the last has all bytes on disk, verified.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hosts import Host
from benchmarks.processes import Process


@dataclass
class Work:
    """What is to be moved, from whom to whom."""

    source: Path  # a file or a folder
    size_bytes: int
    folder: Path  # a fresh one for this run
    seeders: Sequence[Host]
    leechers: Sequence[Host]
    tracker: Host
    seconds_max: float = 120.0


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
        for process in self.processes:
            process.kill()

    def cpu_seconds(self) -> float:
        return sum(process.cpu_seconds() for process in self.processes)

    def peak_bytes(self) -> int:
        return max((process.peak_bytes() for process in self.processes), default=0)
