"""What a download found out about a liar reaches the trackers, though the download ends at once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from conftest import Peers, get, share, until
from test_hostile_peers import silently_other_bytes

from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import Unavailable
from peer.reports import Limits
from peer.swarm_events import Fault


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


async def test_who_is_taken_for_gone_says_at_once_that_he_is_there(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    row = await share(ada, source)
    for session, folder in ((ben, "bens"), (cleo, "cleos")):
        await get(session, "hull.bin", tmp_path / folder)
    assert ada._engine is not None and ben._engine is not None and cleo._engine is not None
    me = ada._engine.peer_id
    gone: list[str] = []
    left = ada._engine.swarm_peer_left

    def noted(group: str, name: str, peer_id: str, manifest_id: str) -> None:
        gone.append(peer_id)
        left(group, name, peer_id, manifest_id)

    monkeypatch.setattr(ada._engine, "swarm_peer_left", noted)
    body = t.ReportBody(name="hull.bin", manifest_id=row.manifest_id, peer_id=me, fault="unreachable")
    for other in (ben._engine, cleo._engine):
        await other.client.report_peer("boats", body)
    await until(lambda: me in gone)

    async with asyncio.timeout(3):  # of itself it would announce every ten seconds
        while True:
            told = await ben._engine.client.show_swarm("boats", "hull.bin", manifest_id=row.manifest_id)
            if me in {peer.peer_id for peer in told.peers}:
                break
            await asyncio.sleep(0.05)


async def test_that_a_peer_was_not_reached_is_not_told_much_later(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have come back meanwhile. That it sent a wrong piece stays true."""
    deadlines: dict[str, float] = {}

    async def nobody_there(
        self: TrackerClient, group: str, body: t.ReportBody, *, key: str | None = None
    ) -> t.Done:
        deadlines[body.fault] = self._write_deadline_seconds
        raise Unavailable("no tracker could answer")

    monkeypatch.setattr(TrackerClient, "report_peer", nobody_there)
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(16 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await ada.limits(Limits(up_bytes_per_second=1 << 20))
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "bens"))
    await until(lambda: ben._engine is not None and list(ben._engine.getting.drivers()))
    engine = ben._engine
    assert engine is not None
    (driver,) = engine.getting.drivers()
    for fault in Fault:
        await engine._report(driver, "p" * 52, fault)
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)
    assert deadlines["unreachable"] == deadlines["stalled"] <= 3.0
    assert deadlines["bad_piece"] > 10.0
