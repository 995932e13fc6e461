"""Real tracker processes for tests: started, killed, started again, each on its own folder."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from chaos_tests.ports import free_base_port
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError
from cluster.api.types import StatusAnswer
from cluster.config import NodeConfig
from cluster.local import prepare

DEADLINE_SECONDS = 30.0


async def until(
    condition: Callable[[], Awaitable[bool]], what: str, seconds: float = DEADLINE_SECONDS
) -> float:
    """Wait for it; returns how long it took."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if await condition():
            return time.monotonic() - begin
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


class Trackers:
    def __init__(self, folder: Path, nodes: int = 3, *, insecure: bool = False) -> None:
        self.folder = folder
        self.insecure = insecure
        # One port more than nodes: a test may add one.
        self.base_port = free_base_port(nodes + 1)
        self.configs: dict[str, NodeConfig] = {
            config.node_id: config for config in prepare(folder, nodes, self.base_port, insecure=insecure)
        }
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._clients: list[TrackerClient] = []

    @property
    def ca(self) -> Path | None:
        return None if self.insecure else self.folder / "ca.pem"

    def url(self, node_id: str) -> str:
        return self.configs[node_id].http

    def client(self, *node_ids: str, operator: bool = False) -> TrackerClient:
        folder = self.folder / "operator"
        client = TrackerClient(
            [self.url(node_id) for node_id in node_ids or self.configs],
            ca=self.ca,
            insecure=self.insecure,
            client_certificate=(folder / "operator.pem", folder / "operator.key") if operator else None,
        )
        self._clients.append(client)
        return client

    async def start(self, *node_ids: str) -> None:
        """Start them (all, by default), and wait until each is ready."""
        chosen = node_ids or tuple(self.configs)
        await asyncio.gather(*(self.launch(node_id) for node_id in chosen))
        await asyncio.gather(*(self.until_ready(node_id) for node_id in chosen))

    async def launch(self, node_id: str) -> None:
        folder = self.configs[node_id].data_dir
        with (folder / "tracker.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.node_process",
                str(folder),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self.processes[node_id] = process
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_SECONDS)
        assert line, (folder / "tracker.log").read_text()[-2000:]

    async def status(self, node_id: str) -> StatusAnswer | None:
        async with TrackerClient([self.url(node_id)], ca=self.ca, insecure=self.insecure) as client:
            with suppress(TrackerError):
                return await client.within(2.0).status(at=self.url(node_id))
        return None

    async def until_ready(self, node_id: str) -> None:
        async def ready() -> bool:
            status = await self.status(node_id)
            return status is not None and status.ready

        await until(ready, f"{node_id} ready")

    async def leader(self) -> str:
        """The one that a majority names."""
        found = ""

        async def agreed() -> bool:
            nonlocal found
            seen = [status.leader for n in self.configs if (status := await self.status(n)) and status.quorum]
            found = next((n for n in seen if n and seen.count(n) * 2 > len(self.configs)), "")
            return bool(found)

        await until(agreed, "a leader")
        return found

    async def kill(self, *node_ids: str) -> None:
        for node_id in node_ids:
            self.processes[node_id].send_signal(signal.SIGKILL)
        for node_id in node_ids:
            await self.processes.pop(node_id).wait()

    async def terminate(self, node_id: str) -> int:
        process = self.processes.pop(node_id)
        process.terminate()
        return await asyncio.wait_for(process.wait(), DEADLINE_SECONDS)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
