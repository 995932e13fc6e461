"""How a download begins: several peers are asked for the manifest, the first right answer counts, and the connections
to all that answered are used for the first pieces."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from conftest import Peers, get, share, until

from cluster.api import types as t
from peer.links import Link, Links
from peer.manifest import Manifest
from peer.manifests import ManifestFetcher
from peer.swarm import Swarm


@pytest.mark.parametrize(("pieces_max", "end"), [(1, "finished"), (0, "cancelled")])
async def test_who_is_not_needed_any_more_may_finish_unless_it_is_much(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces_max: int, end: str
) -> None:
    """Three seeders are asked at once, and two of them answer late."""
    source = tmp_path / "hull.bin"
    source.write_bytes(b"hull" * 1000)
    for user in ("ada", "ben", "cleo"):
        await share(await peers.open(user), source)
    dora = await peers.open("dora")
    go_on, asked = asyncio.Event(), 0
    ends: list[str] = []
    ask_one = ManifestFetcher._ask_one

    async def late_but_for_the_first(
        self: ManifestFetcher, file: t.FileView, peer: t.SwarmPeer, token: str, answered: set[str]
    ) -> Manifest | None:
        nonlocal asked
        asked += 1
        if asked == 1:
            return await ask_one(self, file, peer, token, answered)
        try:
            await go_on.wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        ends.append("finished")
        return None

    monkeypatch.setattr(ManifestFetcher, "_ask_one", late_but_for_the_first)
    monkeypatch.setattr("peer.manifests.LINGER_PIECES_MAX", pieces_max)
    monkeypatch.setattr("peer.manifests.LINGER_SECONDS", 60.0)
    await get(dora, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert asked == 3
    go_on.set()
    await until(lambda: len(ends) == 2)
    assert ends == [end, end]


async def test_the_first_pieces_do_not_wait_for_a_link(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seeder that has just sent the manifest is asked at once: here its link never comes."""
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(3 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)

    async def never(self: Links, swarm: Swarm, group: str, peer_id: str, address: str) -> Link:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(Links, "_dial", never)
    async with asyncio.timeout(10):
        report = await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert [each.user for each in report.sources] == ["ada"]
