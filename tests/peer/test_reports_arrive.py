"""What a download found out about a liar reaches the trackers, though the download ends at once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from conftest import Peers, get, share
from test_hostile_peers import silently_other_bytes

from cluster.api import types as t
from cluster.api.client import TrackerClient


async def test_a_get_that_ends_still_tells_of_a_wrong_piece(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    plain = TrackerClient.report_peer

    async def slowly(
        self: TrackerClient, group: str, body: t.ReportBody, *, key: str | None = None
    ) -> t.Done:
        await asyncio.sleep(0.7)  # a tracker that is busy
        done = await plain(self, group, body, key=key)
        told.append(body.fault)
        return done

    monkeypatch.setattr(TrackerClient, "report_peer", slowly)
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(6 << 20))
    (tmp_path / "twin").mkdir()
    twin = tmp_path / "twin/hull.bin"
    twin.write_bytes(source.read_bytes())
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, twin)
    await share(ben, source)
    silently_other_bytes(twin)
    async with asyncio.timeout(20):
        await get(cleo, "hull.bin", tmp_path / "there")
    await peers.close(cleo)
    assert "bad_piece" in told
