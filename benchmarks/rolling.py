"""A rolling restart under load: every node asked to stop, and started again, one after the other.

Writers publish files through the product's own client, which retries as a peer's does. Counted: requests that
failed for the caller, acknowledged writes that are missing afterwards, and the slowest write.
"""

from __future__ import annotations

import asyncio
import time

from benchmarks.clusters import Trimaran, ask
from benchmarks.processes import wait_until
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError
from cluster.api.types import FileBody

WRITERS = 8
BETWEEN_SECONDS = 2.0


class _Writer:
    def __init__(self, client: TrackerClient, number: int) -> None:
        self._client = client
        self._prefix = f"rolling-{number}"
        self.acknowledged: dict[str, str] = {}
        self.failed = 0
        self.slowest_seconds = 0.0

    async def run(self) -> None:
        number = 0
        while True:
            number += 1
            name, manifest_id = f"{self._prefix}-{number % 200}", f"{number:064x}"
            body = FileBody(
                kind="file", size_bytes=1, pieces=1, piece_bytes=262_144, algorithm="sha256",
                manifest_id=manifest_id, replace=True,
            )  # fmt: skip
            begun = time.monotonic()
            try:
                await self._client.publish_file("bench", name, body)
            except TrackerError:
                self.failed += 1
            else:
                self.acknowledged[name] = manifest_id
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - begun)


def measure(cluster: Trimaran) -> dict[str, float]:
    return asyncio.run(_measure(cluster))


async def _measure(cluster: Trimaran) -> dict[str, float]:
    async with TrackerClient(cluster.urls, insecure=True) as client:
        me = client.as_session(cluster.session)
        writers = [_Writer(me, number) for number in range(WRITERS)]
        tasks = [asyncio.create_task(writer.run()) for writer in writers]
        try:
            for number in range(len(cluster.urls)):
                await asyncio.sleep(BETWEEN_SECONDS)
                await asyncio.to_thread(_restart, cluster, number)
            await asyncio.sleep(BETWEEN_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        found = {file.name: file.manifest_id for file in (await me.list_files("bench")).files}
    lost = sum(
        # A write that was under way when its writer ended may have come after the last acknowledged one.
        int(found.get(name, "0"), 16) < int(manifest_id, 16)
        for writer in writers
        for name, manifest_id in writer.acknowledged.items()
    )
    return {
        "restarts": len(cluster.urls),
        "failed_requests": sum(writer.failed for writer in writers),
        "lost_writes": lost,
        "slowest_write_seconds": round(max(writer.slowest_seconds for writer in writers), 3),
    }


def _restart(cluster: Trimaran, number: int) -> None:
    cluster.nodes[number].stop(30)
    cluster.restart(number)
    wait_until(
        lambda: ask(f"{cluster.urls[number]}/v1/status", seconds=1)[1].get("ready") is True,
        60,
        f"node {number} is ready again",
        [cluster.nodes[number]],
    )
