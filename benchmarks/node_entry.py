"""A tracker node as the benchmarks run it: the product's own `run_node`, with a closer look inside.

    python -m benchmarks.node_entry DATA_DIR REPORT

Appends one line of JSON a second to REPORT: the longest hold of the event loop in that second, by a timer
due every 2 ms, and the processor time this thread used in it; and a line when a snapshot begins or ends to be
written or installed. Times are the machine's monotonic clock. SIGUSR1 begins a snapshot now: the product
begins one when the log has grown past the last one, which would take minutes of writing here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from cluster.app import run_node
from cluster.config import load_config
from cluster.loop_probe import LoopProbe
from cluster.raft.core import RaftCore
from cluster.service import Service

PROBE_SECONDS = 0.002
POLL_SECONDS = 0.005


class Watcher:
    def __init__(self, core: RaftCore, report: TextIO) -> None:
        self._core = core
        self._report = report
        self._seen: dict[str, Any] = {}

    def say(self, **what: Any) -> None:
        self._report.write(json.dumps({"at": time.monotonic(), **what}) + "\n")
        self._report.flush()

    async def run(self) -> None:
        while True:
            probe = LoopProbe(PROBE_SECONDS)
            probe.start()
            second = time.monotonic() + 1
            while time.monotonic() < second:
                await asyncio.sleep(POLL_SECONDS)
                self._look()
            held, used = probe.longest()
            probe.stop()
            self.say(held=held, used=used)

    def _look(self) -> None:
        work = self._core.snapshotting
        seen = {
            "writing": work._writing is not None,
            "receiving": work._receiving is not None,
            "installing": work._installing is not None,
            "sending": bool(work._sending),
        }
        for name, value in seen.items():
            if value != self._seen.get(name, False):
                self.say(what=name, begins=value)
        self._seen = seen


def main() -> int:
    folder, report = Path(sys.argv[1]), Path(sys.argv[2])
    watchers: list[asyncio.Task[None]] = []
    plain = Service.start

    async def start(self: Service) -> None:
        core = self.consensus.core  # type: ignore[attr-defined]
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, core.snapshotting.begin)
        await plain(self)
        watchers.append(asyncio.create_task(Watcher(core, report.open("a")).run()))

    Service.start = start  # type: ignore[method-assign]
    run_node(load_config(folder, environment=os.environ), lambda running: None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
