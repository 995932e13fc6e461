"""Peers over mutual TLS, with three real tracker processes: certificates, stolen tokens, and rights withdrawn while
the seeder's own tracker dies or stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from conftest import PASSWORD, Insistent, get, share, until
from tracker_processes import Trackers

from cluster.api import certificates
from cluster.tls import PEER_DAYS, PeerAuthority, utc_now
from peer.reports import PeerSettings
from peer.session import LocalSession, open_session


class Cluster:
    def __init__(self, trackers: Trackers, folder: Path) -> None:
        self.trackers = trackers
        self.folder = folder
        self.sessions: dict[str, LocalSession] = {}

    async def peer(self, user: str, *, first: str = "n1", up: int = 0) -> LocalSession:
        """A signed-in member of `boats` that prefers one tracker."""
        order = sorted(self.trackers.configs, key=lambda node: (node != first, node))
        settings = PeerSettings(
            home=self.folder / user, trackers=tuple(self.trackers.url(node) for node in order), ca=self.trackers.ca,
            listen="127.0.0.1:0", up_bytes_per_second=up,
        )  # fmt: skip
        session = await open_session(settings)
        assert isinstance(session, LocalSession)
        self.sessions[user] = session
        await session.register(user, PASSWORD)
        await session.login(user, PASSWORD)
        client = self.trackers.client().as_session(self.token(user))
        if user == "ada":
            await client.create_group("boats")
        else:
            await client.request_join("boats")
            await self.trackers.client().as_session(self.token("ada")).put_member("boats", user, "accept")
        return session

    def token(self, user: str) -> str:
        sign_in = self.sessions[user]._identity.sign_in
        assert sign_in is not None
        return sign_in.session


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    trackers = Trackers(tmp_path / "trackers")
    made = Cluster(trackers, tmp_path)
    try:
        await trackers.start()
        yield made
    finally:
        for session in made.sessions.values():
            await asyncio.wait_for(session.close(), 20)
        await trackers.close()


async def test_mutual_tls_and_a_stolen_token(cluster: Cluster, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(3 << 20))
    ada, ben, cleo = await cluster.peer("ada"), await cluster.peer("ben"), await cluster.peer("cleo")
    shared = await share(ada, source)
    report = await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert report.received_bytes == 3 << 20
    await get(cleo, "hull.bin", tmp_path / "cleos")
    url = f"https://{ada.listen_address}/v1/swarms/{shared.manifest_id}/pieces/0"
    engine = ben._engine
    assert engine is not None
    bens = engine.agent.token("boats")
    async with aiohttp.ClientSession() as http:
        own = ben._identity.client_context()
        async with http.get(url, ssl=own, headers={"Authorization": f"Bearer {bens}"}) as answer:
            assert answer.status == 200
        stolen = cleo._identity.client_context()
        async with http.get(url, ssl=stolen, headers={"Authorization": f"Bearer {bens}"}) as answer:
            assert answer.status == 403
    async with aiohttp.ClientSession() as http:  # without a certificate there is not even an answer
        strange = ssl.create_default_context()
        strange.check_hostname, strange.verify_mode = False, ssl.CERT_NONE
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            async with http.get(url, ssl=strange, headers={"Authorization": f"Bearer {bens}"}):
                pass


async def test_a_peers_certificate_renews_itself_while_it_serves(cluster: Cluster, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(12 << 20))
    ada, ben = await cluster.peer("ada", up=4 << 20), await cluster.peer("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
    await until(lambda: ada._engine is not None and ada._engine.server.sendings)
    identity = ada._identity
    folder = cluster.trackers.configs["n1"].folder
    authority = PeerAuthority.load(folder.peer_authority, folder.peer_authority_key)
    long_ago = utc_now() - timedelta(days=PEER_DAYS * 0.9)
    identity.certify(authority.certify(identity.request_pem(), identity.peer_id, now=long_ago).pem)
    assert identity.renew_in_seconds() == 0
    # Soon a handshake shows a new one, and the transfer that ran meanwhile did not notice.
    host, _, port = ada.listen_address.rpartition(":")
    shown = None
    async with asyncio.timeout(20):
        while shown is None or shown.not_valid_before_utc < long_ago + timedelta(days=PEER_DAYS * 0.5):
            tls = ben._identity.client_context()
            _, writer = await asyncio.open_connection(host, int(port), ssl=tls)
            shown = certificates.certificate_of(writer.get_extra_info("ssl_object"))
            writer.transport.abort()
            await asyncio.sleep(0.05)
    assert identity.renew_in_seconds() > 0
    await getting
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()


async def test_a_right_ends_though_the_seeders_tracker_is_in_trouble(
    cluster: Cluster, tmp_path: Path
) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(40 << 20))
    leader = await cluster.trackers.leader()
    near = next(node for node in sorted(cluster.trackers.configs) if node != leader)  # the seeder's own
    process = cluster.trackers.processes[near]
    ada = await cluster.peer("ada", first=near, up=4 << 20)
    shared = await share(ada, source)
    others = {"none": "ben", "paused": "cleo", "killed": "dora"}
    for user in others.values():
        await cluster.peer(user, first=leader)
    kicker = cluster.trackers.client(leader).as_session(cluster.token("ada"))
    for trouble, user in others.items():
        other = cluster.sessions[user]
        engine = await other._running()
        asker = Insistent(
            ada.listen_address,
            shared.manifest_id,
            shared.pieces,
            await engine.agent.ensure_token("boats"),
            other._identity.client_context(),
        )
        await until(lambda asker=asker: asker.bytes > 1 << 20)
        if trouble == "paused":  # at that moment
            process.send_signal(signal.SIGSTOP)
        elif trouble == "killed":
            process.send_signal(signal.SIGKILL)
        await kicker.remove_member("boats", user)
        acknowledged = time.monotonic()
        bound = 1.0 if trouble == "none" else 3.0
        await asyncio.sleep(bound + 1.0)
        asker.stop()
        if trouble == "paused":
            process.send_signal(signal.SIGCONT)
        took = asker.last - acknowledged
        assert took < bound, f"{trouble}: served {took:.3f} s after the acknowledgement"
        assert asker.refusals[-1] == 403, trouble
