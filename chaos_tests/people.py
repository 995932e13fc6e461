"""People with a peer each, as real processes of the `trimaran` command.

Owned here: a person's home, signing up, the long-running peer (started, stopped, killed, under a prefix such as a
network namespace), and the verbs by which the command is asked. Each person has a list of trackers of its own, so a
fault on a link can hit one peer alone. Left to others: what is done to them, and what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

CLI = [sys.executable, "-m", "trimaran"]
ROOT = Path(__file__).parents[1]
PASSWORD = "correct horse battery staple"
START_SECONDS = 30.0


class CommandFailed(RuntimeError):
    """A command ended with another code than 0."""

    def __init__(self, person: str, words: Sequence[str], code: int, told: str) -> None:
        super().__init__(f"{person}: trimaran {' '.join(words)}: exit {code}: {told.strip()}")
        self.code = code


class Person:
    def __init__(
        self,
        name: str,
        folder: Path,
        urls: Sequence[str],
        ca: Path | None,
        *,
        prefix: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.name, self.home = name, folder / name
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self.peer_id = ""
        self.address = ""
        self.process: asyncio.subprocess.Process | None = None
        self._prefix, self._host = list(prefix), host
        self._common = ["--home", str(self.home), "--trackers", ",".join(urls)]
        self._common += ["--insecure"] if ca is None else ["--ca", str(ca)]

    # --- the command ------------------------------------------------------------------------------

    async def run(self, *words: str, seconds: float = 60.0) -> tuple[int, str, str]:
        """One command: exit code, what it printed, what it said on standard error."""
        process = await asyncio.create_subprocess_exec(
            *self._prefix, *CLI, *words, *self._common, "--json", stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT, env=_environment(),
        )  # fmt: skip
        try:
            out, err = await asyncio.wait_for(process.communicate(), seconds)
        except (TimeoutError, asyncio.CancelledError):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def ok(self, *words: str, seconds: float = 60.0) -> Any:
        """Its JSON answer. Raises CommandFailed."""
        code, out, err = await self.run(*words, seconds=seconds)
        if code:
            raise CommandFailed(self.name, words, code, err)
        return orjson.loads(out.splitlines()[-1]) if out.strip() else None

    async def found(self, group: str) -> None:
        await self.ok("register", self.name)
        await self.ok("group", "create", group)

    async def join(self, group: str, owner: Person) -> None:
        await self.ok("register", self.name)
        await self.ok("group", "join", group)
        await owner.ok("group", "accept", group, self.name)

    async def share(self, path: Path, group: str) -> tuple[str, int]:
        """(manifest id, pieces)."""
        report = await self.ok("share", str(path), "--group", group, seconds=180)
        return str(report["manifest_id"]), int(report["pieces"])

    async def row(self, group: str, name: str) -> dict[str, Any]:
        """The file's row in `ps`; empty when there is none."""
        rows = await self.ok("ps")
        return next((row for row in rows if (row["group"], row["name"]) == (group, name)), {})

    # --- the peer ---------------------------------------------------------------------------------

    async def start(self, *, up: str = "", down: str = "", listen: str = "") -> None:
        """Start `peer run`; returns when it is ready."""
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._prefix, *CLI, "peer", "run", *self._common, "--listen", listen or f"{self._host}:0", "--json",
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=_environment(),
            )  # fmt: skip
        until = time.monotonic() + START_SECONDS
        while True:
            text = self.log.read_bytes()[before:]
            line = next((part for part in text.splitlines() if b'"peer_id"' in part), None)
            if line is not None:
                break
            if not self.alive or time.monotonic() > until:
                raise RuntimeError(f"{self.name} does not start: {text.decode(errors='replace')[-500:]}")
            await asyncio.sleep(0.05)
        ready = orjson.loads(line)
        self.peer_id, self.address = ready["peer_id"], ready["listen"]
        if up or down:
            limits = (["--up", up] if up else []) + (["--down", down] if down else [])
            await self.ok("peer", "limits", *limits)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def stop(self) -> int:
        """As by Ctrl-C; the exit code."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        return await asyncio.wait_for(self.process.wait(), 20)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


def _environment() -> Mapping[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
    return clean | {"TRIMARAN_PASSWORD": PASSWORD}


async def until(true: Callable[[], Any], what: str, seconds: float) -> float:
    """Wait for a condition (an answer, or an awaitable of one); the seconds it took. Raises TimeoutError."""
    begun = time.monotonic()
    while True:
        answer = true()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return time.monotonic() - begun
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        await asyncio.sleep(0.02)
