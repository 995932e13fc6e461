from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from small_trackers import Behaviour, MakeClient, SmallTracker, StartTracker

from cluster.api.client import TrackerClient


@pytest.fixture
async def exits() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def tracker(exits: AsyncExitStack) -> StartTracker:
    async def start(behave: Behaviour) -> SmallTracker:
        started = await SmallTracker(behave).start()
        exits.push_async_callback(started.stop)
        return started

    return start


@pytest.fixture
def client(exits: AsyncExitStack) -> MakeClient:
    def make(*trackers: SmallTracker | str, **options: object) -> TrackerClient:
        urls = [one if isinstance(one, str) else one.url for one in trackers]
        options.setdefault("insecure", True)
        options.setdefault("chance", random.Random(1))
        made = TrackerClient(urls, **options)  # type: ignore[arg-type]
        exits.push_async_callback(made.close)
        return made

    return make
