"""Writes for the sake of the log: so that nodes come to compact it while a fault lasts.

They change nothing for good (a group is made and deleted, again and again), for a snapshot that grows would put the
next one off. They are no part of the workload, and not in its history.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from chaos_tests import ending
from chaos_tests.client import request_id

if TYPE_CHECKING:
    from chaos_tests.rig import Rig

WRITERS = 6
PASSWORD = "only the log shall grow"
AGAIN_SECONDS = 0.2


@asynccontextmanager
async def growing(rig: Rig, nodes: Sequence[str]) -> AsyncIterator[None]:
    """While it lasts, the log grows through these nodes as fast as they take it."""
    writers = [asyncio.create_task(_write(rig, nodes, number)) for number in range(WRITERS)]
    try:
        yield
    finally:
        await ending.end(writers)


async def _write(rig: Rig, nodes: Sequence[str], number: int) -> None:
    name = f"log-writer-{number}"
    group = {"name": f"{name}-{'x' * 40}"[:60]}
    api = rig.api()
    try:
        for node in itertools.cycle(nodes):
            if not api.session:
                account = {"user": name, "password": PASSWORD}
                await api.call(node, "POST", "/v1/users", body=account, request_id=request_id(), seconds=2)
                done = await api.login(node, name, PASSWORD)
            else:
                await api.call(node, "POST", "/v1/groups", body=group, request_id=request_id(), seconds=2)
                done = await api.call(
                    node, "DELETE", f"/v1/groups/{group['name']}", request_id=request_id(), seconds=2
                )
            if done.end != "ok":
                await asyncio.sleep(AGAIN_SECONDS)
    finally:
        await api.close()
