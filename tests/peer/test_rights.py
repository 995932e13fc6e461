"""Who may have pieces, and that the right ends the moment it is withdrawn."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import aiohttp
import jwt
import msgspec
import pytest
from conftest import Insistent, Peers, get, ignore, share, until
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trackers import running

from cluster.api.tokens import Claims, sign_token
from peer.access import AccessRefusedError
from peer.reports import Exit, Limits, State, TrimaranError
from peer.server import NextBody
from peer.session import LocalSession
from peer.swarm_events import WaitReason


def address(session: LocalSession) -> str:
    return f"http://{session.listen_address}"


def token_of(session: LocalSession, group: str = "boats") -> str:
    assert session._engine is not None
    token = session._engine.agent.token(group)
    assert token is not None
    return token


def routes(manifest_id: str) -> dict[str, tuple[str, str, bytes]]:
    """A request for every route the server has."""
    swarm = f"/v1/swarms/{manifest_id}"
    return {
        r"/v1/swarms/{manifest_id}/manifest": ("GET", f"{swarm}/manifest", b""),
        r"/v1/swarms/{manifest_id}/pieces/{index}": ("GET", f"{swarm}/pieces/0", b""),
        r"/v1/swarms/{manifest_id}/next": (
            "POST",
            f"{swarm}/next",
            msgspec.msgpack.encode(NextBody(b"\xf0")),
        ),
        r"/v1/swarms/{manifest_id}/link": ("GET", f"{swarm}/link", b""),
        r"/{anything}": ("GET", "/v1/anything", b""),
    }


async def test_every_route_refuses_everyone_who_has_no_right(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    shared = await share(ada, source)
    (tmp_path / "other.bin").write_bytes(b"x")
    await share(ben, tmp_path / "other.bin")
    # A member of another group only.
    await peers.trackers.group("rivals", await peers.trackers.login("ben"))
    assert ben._engine is not None
    await ben._engine.agent.ensure_token("rivals")
    good = token_of(ben)
    engine = ada._engine
    assert engine is not None
    key_id = next(iter(engine.access.keys))
    now = time.time_ns() // 1_000_000
    claims = Claims(
        user="ben", peer_id=ben._identity.peer_id, group="boats", epoch=1 << 40, issued_at_ms=now,
        expires_at_ms=now + 60_000,
    )  # fmt: skip
    head, body, signature = good.split(".")
    bad = {
        "none": "",
        "garbage": "Bearer abc",
        "forged": f"Bearer {sign_token(claims, Ed25519PrivateKey.generate(), key_id)}",
        "of an unknown key": f"Bearer {sign_token(claims, Ed25519PrivateKey.generate(), 'n9-x')}",
        "changed": f"Bearer {head}.{body[:-2]}xx.{signature}",
        "unsigned": f"Bearer eyJhbGciOiJub25lIn0.{body}.",
        "another scheme": f"Basic {good}",
    }
    asked = routes(shared.manifest_id)
    served = {
        "/v1/swarms/{manifest_id}/" + what + ("/{index}" if indexed else "")
        for _, what, indexed in engine.server.routes
    }
    assert served | {"/{anything}"} == set(asked), "a route that this test does not know"
    async with aiohttp.ClientSession() as http:
        for method, path, data in asked.values():
            for what, header in bad.items():
                async with http.request(
                    method, address(ada) + path, data=data, headers={"Authorization": header}
                ) as answer:
                    assert answer.status == 401, (what, method, path, answer.status)
            # A right to another group tells nothing, not even that it exists.
            headers = {"Authorization": f"Bearer {token_of(ben, 'rivals')}"}
            async with http.request(method, address(ada) + path, data=data, headers=headers) as answer:
                seen = await answer.read()
                assert answer.status == 404, (method, path)
            if "swarms" in path:
                nothing = path.replace(shared.manifest_id, "0" * 64)
                async with http.request(method, address(ada) + nothing, data=data, headers=headers) as answer:
                    assert await answer.read() == seen
        headers = {"Authorization": f"Bearer {good}"}
        pieces = f"{address(ada)}/v1/swarms/{shared.manifest_id}/pieces"
        async with http.get(f"{pieces}/1", headers=headers) as answer:
            assert (answer.status, answer.headers["Trimaran-Piece"]) == (200, "1")
            assert await answer.read() == source.read_bytes()[1 << 18 : 1 << 19]
        async with http.get(f"{pieces}/1", headers=headers | {"Range": "bytes=10-19"}) as answer:
            assert answer.status == 206
            assert await answer.read() == source.read_bytes()[(1 << 18) + 10 : (1 << 18) + 20]
        async with http.get(f"{pieces}/99", headers=headers) as answer:
            assert answer.status == 404


async def test_a_kicked_member_is_cut_off_in_the_middle(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(24 << 20))
    ada = await peers.open("ada", up_bytes_per_second=8 << 20)
    ben = await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
    async with asyncio.timeout(10):
        while not (rows := await ben.ps()) or not rows[0].done_bytes:
            await asyncio.sleep(0.01)
    (row,) = await ada.ps()
    asker = Insistent(ada.listen_address, row.manifest_id, 12, token_of(ben), None)
    await until(lambda: asker.bytes > 1 << 20)
    reply = await peers.trackers.call("DELETE", "/v1/groups/boats/members/ben", session=peers.owner)
    assert reply.status == 200
    acknowledged = time.monotonic()
    await asyncio.sleep(2.0)
    asker.stop()
    assert asker.last - acknowledged < 1.0, "a byte was served a second after the removal was acknowledged"
    assert asker.refusals[-1] == 403
    with pytest.raises(TrimaranError) as refused:
        await getting
    assert refused.value.exit_code in (Exit.DENIED, Exit.UNFINISHED)
    with pytest.raises(TrimaranError) as again:
        await get(ben, "hull.bin", tmp_path / "there")
    assert again.value.exit_code is Exit.DENIED


async def test_a_removed_file_is_not_served_any_more(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    shared = await share(ada, source)
    await get(ben, "hull.bin", tmp_path / "there")
    reply = await peers.trackers.call("DELETE", "/v1/groups/boats/files/hull.bin", session=peers.owner)
    assert reply.status == 200
    removed = time.monotonic()
    path = f"/v1/swarms/{shared.manifest_id}/pieces/0"
    async with aiohttp.ClientSession() as http:
        for session, other in ((ada, ben), (ben, ada)):
            status = 200
            while status == 200:
                headers = {"Authorization": f"Bearer {token_of(other)}"}
                async with http.get(address(session) + path, headers=headers) as answer:
                    status = answer.status
                assert time.monotonic() - removed < 1.0
            assert status in (403, 404)
    # Shared again, it is served again.
    await share(ada, source)
    await get(ben, "hull.bin", tmp_path / "again")


async def test_trackers_away_downloads_go_on(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(8 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=1 << 20))
    async with asyncio.timeout(10):
        while not (rows := await ben.ps()) or not rows[0].done_bytes:
            await asyncio.sleep(0.01)
    await asyncio.gather(*(node.service.stop() for node in peers.trackers.nodes))
    await asyncio.gather(*(node.runner.cleanup() for node in peers.trackers.nodes))
    assert not getting.done()
    await getting
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()


async def test_an_expired_token_is_not_honoured(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    shared = await share(ada, source)
    (tmp_path / "other.bin").write_bytes(b"x")
    await share(ben, tmp_path / "other.bin")
    engine = ada._engine
    assert engine is not None
    later = time.time_ns() // 1_000_000 + 3_600_000
    engine.access._wall_ms = lambda: later
    headers = {"Authorization": f"Bearer {token_of(ben)}"}
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{address(ada)}/v1/swarms/{shared.manifest_id}/pieces/0", headers=headers) as answer,
    ):
        assert answer.status == 401


async def test_who_left_shares_nothing_with_the_group(peers: Peers, tmp_path: Path) -> None:
    ada, ben = await peers.open("ada"), await peers.open("ben")
    (tmp_path / "mine.bin").write_bytes(os.urandom(1000))
    await share(ben, tmp_path / "mine.bin")
    reply = await peers.trackers.call(
        "DELETE", "/v1/groups/boats/members/ben", session=await peers.trackers.login("ben")
    )
    assert reply.status == 200
    async with asyncio.timeout(5):
        while [row.state for row in await ben.ps()] != [State.WAITING]:
            await asyncio.sleep(0.02)
    with pytest.raises(TimeoutError):  # it waits for somebody who has it
        async with asyncio.timeout(2):
            await get(ada, "mine.bin", tmp_path / "there")


async def test_signing_keys_rotate_and_no_download_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes' keys live for a second and a half here, tokens for four: each renewal comes under another key."""
    monkeypatch.setattr("cluster.service._KEY_REST_SECONDS", 0.1)
    changes = {"token_seconds": 4.0, "signing_key_seconds": 1.5, "session_seconds": 600.0}
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(16 << 20))
    async with running(tmp_path / "trackers", 2, changes=changes) as trackers:
        peers = Peers(trackers, tmp_path)
        try:
            ada, ben = await peers.open("ada", up_bytes_per_second=2 << 20), await peers.open("ben")
            await share(ada, source)
            engine = ada._engine
            assert engine is not None
            refused: list[str] = []
            check = engine.access.check

            def counted(token: str | None, peer_id: str | None, group: str | None = None) -> Claims:
                try:
                    return check(token, peer_id, group)
                except AccessRefusedError as error:
                    refused.append(error.code)
                    raise

            monkeypatch.setattr(engine.access, "check", counted)
            getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
            keys_used: set[str] = set()
            reasons: set[str] = set()
            async with asyncio.timeout(60):
                while not getting.done():
                    keys_used |= {jwt.get_unverified_header(token_of(ben))["kid"]} if ben._engine else set()
                    # At its beginning it may wait for peers; what it may not wait for is a right.
                    reasons |= {row.reason for row in await ben.ps() if row.state is State.WAITING}
                    await asyncio.sleep(0.05)
            await getting
            assert not reasons & {WaitReason.TOKEN_EXPIRED.value, WaitReason.REFUSED.value}
            assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
            assert len(keys_used) >= 3, "the keys did not rotate"
            assert not refused
        finally:
            await peers.close_all()


async def test_groups_that_share_the_same_content_do_not_hear_of_each_others_members(
    peers: Peers, tmp_path: Path
) -> None:
    """ada shares one file with boats and with ships: ben and cleo fetch it from her in one swarm."""
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(8 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await peers.trackers.group("ships", peers.owner, {"cleo": await peers.trackers.user("cleo")})
    cleo = await peers.add("cleo")
    shared = await share(ada, source)
    await ada.share(source, "ships", None, replace=False, algorithm=None, on_progress=ignore)
    assert ada._engine is not None
    swarm = ada._engine.swarms.get(shared.manifest_id)
    assert swarm is not None
    fetching = [
        asyncio.create_task(
            each.get(
                group,
                "hull.bin",
                tmp_path / group,
                down_bytes_per_second=2 << 20,
                checksum=False,
                on_progress=ignore,
            )
        )
        for each, group in ((ben, "boats"), (cleo, "ships"))
    ]
    together = 0
    async with asyncio.timeout(30):
        while not all(task.done() for task in fetching):
            together += {link.group for link in swarm.links.values()} == {"boats", "ships"}
            for each in (ben, cleo):
                for driver in each._engine.getting.drivers() if each._engine else ():
                    assert {known for known, _, _ in driver.machine.known_peers()} <= {ada._identity.peer_id}
            await asyncio.sleep(0.02)
        await asyncio.gather(*fetching)
    assert together, "they were never in the swarm together"


async def quarantine(peers: Peers, session: LocalSession, name: str, manifest_id: str) -> None:
    """Three members report a peer for what it shares."""
    for witness in ("wim", "wanda", "wes"):
        await peers.account(witness)
        body = {
            "name": name,
            "manifest_id": manifest_id,
            "peer_id": session._identity.peer_id,
            "fault": "bad_piece",
        }
        reply = await peers.trackers.call(
            "POST", "/v1/groups/boats/reports", body=body, session=await peers.trackers.login(witness)
        )
        assert reply.status == 200, reply.body


async def test_a_peer_in_quarantine_is_told_so_and_gets_on_when_it_is_lifted(
    peers: Peers, tmp_path: Path
) -> None:
    source, other, bens = tmp_path / "hull.bin", tmp_path / "other.bin", tmp_path / "bens.bin"
    source.write_bytes(os.urandom(8 << 20))
    other.write_bytes(os.urandom(1 << 20))
    bens.write_bytes(os.urandom(1000))
    ada, ben = await peers.open("ada", up_bytes_per_second=1 << 20), await peers.open("ben")
    await share(ada, source)
    await share(ada, other)
    mine = await share(ben, bens)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
    async with asyncio.timeout(10):
        while not any(row.done_bytes for row in await ben.ps() if row.name == "hull.bin"):
            await asyncio.sleep(0.01)
    await quarantine(peers, ben, "bens.bin", mine.manifest_id)
    async with asyncio.timeout(10):  # neither the running one nor a new one waits for good
        for getting_one in (getting, get(ben, "other.bin", tmp_path / "there")):
            with pytest.raises(TrimaranError) as refused:
                await getting_one
            assert (refused.value.exit_code, refused.value.code) == (Exit.DENIED, "quarantined")
            assert f"--lift {ben._identity.peer_id}" in refused.value.hint
    (row,) = [row for row in await ben.ps() if row.name == "hull.bin"]
    assert (row.state, "quarantine" in row.reason) == (State.FAILED, True)
    path = f"/v1/groups/boats/quarantine/{ben._identity.peer_id}"
    assert (await peers.trackers.call("DELETE", path, session=peers.owner)).status == 200
    engine = ben._engine
    assert engine is not None
    await until(lambda: not engine.access.in_quarantine("boats", ben._identity.peer_id))
    assert ada._engine is not None
    ada._engine.set_limits(Limits())
    async with asyncio.timeout(30):
        await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()


async def test_signing_in_and_out(peers: Peers) -> None:
    ada = await peers.open("ada")
    assert (await ada.whoami()).user == "ada"
    await ada.change_password("correct horse battery", "another good one")
    assert (await ada.whoami()).user == "ada"
    with pytest.raises(TrimaranError) as wrong:
        await ada.login("ada", "not the password")
    assert wrong.value.exit_code is Exit.DENIED
    await ada.logout()
    for verb in (ada.whoami(), ada.logout(), ada.unshare("boats", "x")):
        with pytest.raises(TrimaranError) as refused:
            await verb
        assert refused.value.exit_code is Exit.DENIED
