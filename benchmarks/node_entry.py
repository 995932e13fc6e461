"""A tracker node as the benchmarks run it: the product's own `run_node`, with a closer look inside.

    python -m benchmarks.node_entry DATA_DIR REPORT

Appends lines of JSON to REPORT: each hold of the event loop of 5 ms and more, by a timer due every 2 ms, with
the processor time this thread used in it; garbage collections as long; and when a snapshot begins or ends to be
written, sent or installed. Times are the machine's monotonic clock. SIGUSR1 begins a snapshot now: the product
begins one when the log has grown past the last one, which would take minutes of writing here.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from cluster.app import run_node
from cluster.config import load_config
from cluster.raft.core import RaftCore
from cluster.service import Service

PROBE_SECONDS = 0.002
HELD_SECONDS = 0.005


class Watcher:
    def __init__(self, core: RaftCore, report: TextIO) -> None:
        self._core = core
        self._report = report
        self._seen: dict[str, Any] = {}
        self._collecting = 0.0

    def say(self, **what: Any) -> None:
        self._report.write(json.dumps({"at": time.monotonic(), **what}) + "\n")
        self._report.flush()

    def start(self) -> None:
        gc.callbacks.append(self._collects)
        loop = asyncio.get_running_loop()
        due, used = loop.time() + PROBE_SECONDS, time.thread_time()

        def fire() -> None:
            nonlocal due, used
            held = loop.time() - due
            if held >= HELD_SECONDS:
                self.say(held=held, used=time.thread_time() - used)
            self._look()
            due, used = loop.time() + PROBE_SECONDS, time.thread_time()
            loop.call_at(due, fire)

        loop.call_at(due, fire)

    def _collects(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.thread_time()
        elif (took := time.thread_time() - self._collecting) >= HELD_SECONDS:
            self.say(collected=took, generation=info["generation"])

    def _look(self) -> None:
        work = self._core.snapshotting
        seen = {
            "writing": work._writing is not None,
            "receiving": work._receiver is not None,
            "installing": work._installing is not None,
            "sending": bool(work._sending),
        }
        for name, value in seen.items():
            if value != self._seen.get(name, False):
                self.say(what=name, begins=value)
        self._seen = seen


def main() -> int:
    folder, report = Path(sys.argv[1]), Path(sys.argv[2])
    plain = Service.start

    async def start(self: Service) -> None:
        core = self.consensus.core  # type: ignore[attr-defined]
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, core.snapshotting.begin)
        await plain(self)
        Watcher(core, report.open("a")).start()

    Service.start = start  # type: ignore[method-assign]
    run_node(load_config(folder, environment=os.environ), lambda running: None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
