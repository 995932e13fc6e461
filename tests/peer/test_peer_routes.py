"""Walks the routes of the peer server over mutual TLS: who is refused where, and what a refusal gives away.

A route that is not in `REQUESTS` fails the walk. Everyone without a right is refused before anything is looked up:
what they are told of a manifest that is here is, to the byte, what they are told of one that is nowhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.api import certificates
from cluster.api.tokens import Claims, SessionClaims, VerifyingKey, sign_session, sign_token
from cluster.tls import ClusterAuthority, PeerAuthority
from peer.access import Access
from peer.bitmap import full_mask
from peer.buffers import BufferPool
from peer.content import Content, OpenFiles
from peer.hashing import Hashing, scan
from peer.manifest_sending import PER_PEER_MAX
from peer.recent import RecentPieces
from peer.server import NextBody, PieceServer
from peer.swarm import Swarm, Swarms

NOWHERE = "0" * 64
EPOCH = 100


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    body: bytes = b""
    headers: str = ""


def requests(manifest_id: str) -> dict[str, Asked]:
    """A request that a member may make, for each route by its canonical path."""
    swarm = f"/v1/swarms/{manifest_id}"
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    return {
        "/v1/swarms/{manifest_id}/manifest": Asked("GET", f"{swarm}/manifest"),
        "/v1/swarms/{manifest_id}/pieces/{index}": Asked("GET", f"{swarm}/pieces/0"),
        "/v1/swarms/{manifest_id}/next": Asked(
            "POST", f"{swarm}/next", msgspec.msgpack.encode(NextBody(b"\xe0"))
        ),
        "/v1/swarms/{manifest_id}/link": Asked("GET", f"{swarm}/link", headers=upgrade),
        "/{anything}": Asked("GET", f"{swarm}/anything"),
    }


class Party:
    """Somebody with a key, and perhaps a certificate for it."""

    def __init__(self, name: str, folder: Path, ca: Path, peers: PeerAuthority | None) -> None:
        self.key_file, self.certificate_file = folder / f"{name}.key", folder / f"{name}.pem"
        key = certificates.load_or_make_key(self.key_file)
        self.peer_id = certificates.peer_id_of_key(key.public_key())
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname = False
        certificates.trust(self.tls, ca)
        if peers is not None:
            issued = peers.certify(certificates.peer_request(key), self.peer_id)
            certificates.write_durably(self.certificate_file, issued.pem.encode())
            certificates.load_chain(self.tls, self.certificate_file, self.key_file)


@dataclass
class Here:
    server: PieceServer
    access: Access
    port: int
    manifest_id: str
    first_piece: bytes
    parties: dict[str, Party]
    keys: dict[str, Ed25519PrivateKey]
    linked: list[str]

    def token(self, name: str, *, key: str = "n1-now", group: str = "boats", **changes: int) -> str:
        claims = Claims(
            user=name, peer_id=self.parties[name].peer_id, group=group, epoch=changes.get("epoch", EPOCH),
            issued_at_ms=changes.get("issued_at_ms", now_ms() - 60_000),
            expires_at_ms=changes.get("expires_at_ms", now_ms() + 600_000),
        )  # fmt: skip
        return sign_token(claims, self.keys[key], key.removesuffix(" forged"))

    async def ask(self, asked: Asked, tls: ssl.SSLContext, token: str | None) -> tuple[int, str, bytes]:
        """(status, the head without its date, the body). Raises OSError when TLS lets nobody in."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls)
        try:
            authorization = "" if token is None else f"Authorization: Bearer {token}\r\n"
            connection = "" if asked.headers else "Connection: close\r\n"
            writer.write(
                f"{asked.method} {asked.path} HTTP/1.1\r\nHost: peer\r\n{authorization}{asked.headers}{connection}"
                f"Content-Length: {len(asked.body)}\r\n\r\n".encode()
                + asked.body
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = [line for line in head.split("\r\n") if line and not line.startswith("Date:")]
            length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
            body = await reader.readexactly(length)
            return int(lines[0].split()[1]), "\n".join(lines), body
        finally:
            writer.transport.abort()


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    """ada's peer shares a file with boats. ben and eve are members; carl was kicked; dora is in ships alone."""
    root, other_root = ClusterAuthority.make("ours"), ClusterAuthority.make("theirs")
    ca = tmp_path / "ca.pem"
    ca.write_text(root.pem)

    def peer_authority(authority: ClusterAuthority) -> PeerAuthority:
        key = certificates.new_key()
        pem = authority.issue_peer_authority(certificates.make_request(key, "n1"), "n1")
        return PeerAuthority(certificates.parse_certificate(pem), key)

    peers = peer_authority(root)
    parties = {name: Party(name, tmp_path, ca, peers) for name in ("ada", "ben", "carl", "dora", "eve")}
    parties["nobody"] = Party("nobody", tmp_path, ca, None)
    parties["stranger"] = Party("stranger", tmp_path, ca, peer_authority(other_root))
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(3 << 18))
    found = scan(source, "sha256")
    executor = ThreadPoolExecutor(2)
    manifest = await Hashing(found, 1).run(executor)
    (tmp_path / manifest.id).write_bytes(manifest.encode())
    access, swarms, files, linked = Access(), Swarms(), OpenFiles(), list[str]()
    keys = {
        name: Ed25519PrivateKey.generate() for name in ("n1-now", "n1-old", "n9-unknown", "n1-now forged")
    }
    access.set_keys(
        [
            VerifyingKey("n1-now", keys["n1-now"].public_key()),
            VerifyingKey("n1-old", keys["n1-old"].public_key(), now_ms() - 1),
        ]
    )
    swarm = Swarm(
        parties["ada"].peer_id,
        manifest,
        Content(source, manifest.layout, found.prints),
        full_mask(manifest.pieces),
    )
    swarm.offers["boats"] = {"hull.bin"}
    swarms.add(swarm)

    async def link(request: web.Request, swarm: Swarm, claims: Claims) -> web.StreamResponse:
        linked.append(claims.user)
        return web.Response(text="linked")

    server = PieceServer(
        peer_id=parties["ada"].peer_id, swarms=swarms, access=access, files=files, executor=executor,
        recent=RecentPieces(BufferPool(1 << 20)),
        manifest_file=lambda manifest_id: tmp_path / manifest_id, withdraw=lambda swarm, reason: None, link=link,
    )  # fmt: skip
    ada = parties["ada"]
    tls = certificates.peer_server_context(ca, ada.certificate_file, ada.key_file)
    _, port = await server.start("127.0.0.1", 0, tls)
    piece = source.read_bytes()[: manifest.layout.piece_length(0)]
    try:
        yield Here(server, access, port, manifest.id, piece, parties, keys, linked)
    finally:
        await server.stop()
        files.close()
        executor.shutdown()


def test_every_route_is_walked(here: Here) -> None:
    served = {
        "/v1/swarms/{manifest_id}/" + what + ("/{index}" if indexed else "")
        for _, what, indexed in here.server.routes
    }
    assert served | {"/{anything}"} == set(requests(NOWHERE)), "a route that this walk does not know"


async def test_a_member_is_served(here: Here) -> None:
    """Else the walk below would prove nothing."""
    tls, token = here.parties["ben"].tls, here.token("ben")
    seen = {path: await here.ask(asked, tls, token) for path, asked in requests(here.manifest_id).items()}
    assert {path: status for path, (status, _, _) in seen.items()} == {
        "/v1/swarms/{manifest_id}/manifest": 200,
        "/v1/swarms/{manifest_id}/pieces/{index}": 200,
        "/v1/swarms/{manifest_id}/next": 200,
        "/v1/swarms/{manifest_id}/link": 200,
        "/{anything}": 404,
    }
    assert seen["/v1/swarms/{manifest_id}/pieces/{index}"][2] == here.first_piece
    assert here.linked == ["ben"]


async def test_nobody_without_a_right_learns_anything(here: Here) -> None:
    parties = here.parties
    here.access.revocations.add("boats", EPOCH + 1, user="carl")
    later, past = now_ms() + 600_000, now_ms() - 1000
    session = sign_session(
        SessionClaims(user="ben", session_id="s", epoch=1, issued_at_ms=now_ms(), expires_at_ms=later),
        here.keys["n1-now"], "n1-now",
    )  # fmt: skip
    good = here.token("ben")
    head, body, signature = good.split(".")
    # who asks, what they show, the answers they may get
    cases: dict[str, tuple[str, str | None, set[int]]] = {
        "a member of no group": ("dora", None, {401}),
        "a member of another group": ("dora", here.token("dora", group="ships"), {404}),
        "a kicked member": ("carl", here.token("carl"), {403}),
        "a stolen token": ("dora", good, {403}),
        "a kicked member with another's token": ("carl", good, {403}),
        "an expired token": ("ben", here.token("ben", expires_at_ms=past), {401}),
        "a token from the future": (
            "ben", here.token("ben", issued_at_ms=later, expires_at_ms=later + 60_000), {401},
        ),
        "a forged token": ("ben", here.token("ben", key="n1-now forged"), {401}),
        "a token from an unknown key": ("ben", here.token("ben", key="n9-unknown"), {401}),
        "a token from a retired key": ("ben", here.token("ben", key="n1-old"), {401}),
        "a changed token": ("ben", f"{head}.{body[:-2]}xx.{signature}", {401}),
        "an unsigned token": ("ben", f"eyJhbGciOiJub25lIn0.{body}.", {401}),
        "a session in a token's place": ("ben", session, {401}),
        "noise": ("ben", "x" * 3000, {401}),
    }  # fmt: skip
    theirs, nowhere = requests(here.manifest_id), requests(NOWHERE)
    for what, (who, token, expected) in cases.items():
        for path, asked in theirs.items():
            status, told, said = await here.ask(asked, parties[who].tls, token)
            assert status in expected, (what, path, status, said)
            assert here.first_piece[:64] not in said
            assert here.manifest_id.encode() not in said
            assert (status, told, said) == await here.ask(nowhere[path], parties[who].tls, token), (
                what,
                path,
            )
    assert not here.linked
    assert not here.server.sendings


async def test_as_our_fetcher_asks_the_answers_are_the_same(here: Here) -> None:
    """Its requests take a short way (`short_way.py`), over TLS too: with the same rights and the same refusals."""
    here.access.revocations.add("boats", EPOCH + 1, user="carl")
    good, way = here.token("ben"), here.server._way
    assert way is not None
    cases = {
        "a member": ("ben", good, 200),
        "a kicked member": ("carl", here.token("carl"), 403),
        "a stolen token": ("dora", good, 403),
        "another group": ("dora", here.token("dora", group="ships"), 404),
        "a forged token": ("ben", here.token("ben", key="n1-now forged"), 401),
        "an expired token": ("ben", here.token("ben", expires_at_ms=now_ms() - 1000), 401),
        "a token from a retired key": ("ben", here.token("ben", key="n1-old"), 401),
        "a token from an unknown key": ("ben", here.token("ben", key="n9-unknown"), 401),
    }
    for what, (who, token, expected) in cases.items():
        for asked in (requests(here.manifest_id)[f"/v1/swarms/{{manifest_id}}/{path}"] for path in PIECES):
            taken = way.taken
            status, _, body = await here.ask(asked, here.parties[who].tls, token)
            assert (status, way.taken) == (expected, taken), what
            seen = await ask_as_our_fetcher(here, asked, who, token)
            assert seen[0] == status, what
            assert seen[1] == body or asked.method == "POST", what
            assert way.taken == taken + (status == 200), what


PIECES = ("pieces/{index}", "next")


async def ask_as_our_fetcher(here: Here, asked: Asked, who: str, token: str) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port, ssl=here.parties[who].tls)
    length = f"Content-Length: {len(asked.body)}\r\n" if asked.method == "POST" else ""
    # The sender's choice: what it has sent once it does not send again before it hears of it.
    body = msgspec.msgpack.encode(NextBody(b"\x60")) if asked.body else b""
    try:
        writer.write(
            f"{asked.method} {asked.path} HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {token}\r\n{length}\r\n".encode()
            + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        return int(head.split()[1]), await reader.readexactly(
            int(head.partition("content-length: ")[2].split("\r\n")[0])
        )
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("who", ["nobody", "stranger"])
async def test_without_a_certificate_of_this_cluster_nothing_is_said(here: Here, who: str) -> None:
    """No certificate, or another cluster's: not even the peer's name is told."""
    for asked in [*requests(here.manifest_id).values(), Asked("GET", "/v1/hello")]:
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await here.ask(asked, here.parties[who].tls, here.token("ben"))


async def test_a_right_ends_in_the_middle_of_a_connection(here: Here) -> None:
    """Kept connections, and tokens that were checked before, are no way around a withdrawal."""
    tls, token = here.parties["ben"].tls, here.token("ben")
    asked = requests(here.manifest_id)["/v1/swarms/{manifest_id}/pieces/{index}"]
    assert (await here.ask(asked, tls, token))[0] == 200
    here.access.revocations.add("boats", EPOCH + 1, user="ben")
    assert (await here.ask(asked, tls, token))[0] == 403
    again = here.token("ben", epoch=EPOCH + 2)
    assert (await here.ask(asked, tls, again))[0] == 200
    # Its key is retired: what it signed counts no more, though it was seen before.
    here.access.set_keys([VerifyingKey("n1-old", here.keys["n1-old"].public_key())])
    assert (await here.ask(asked, tls, again))[0] == 401


async def test_not_a_byte_is_sent_after_a_token_ends(here: Here) -> None:
    """A transfer that runs when its token ends is cut then, not at the next look."""
    here.server.set_limits(64 * 1024)
    ends = (now_ms() // 1000 + 2) * 1000
    token = here.token("ben", expires_at_ms=ends)
    path = requests(here.manifest_id)["/v1/swarms/{manifest_id}/pieces/{index}"].path
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port, ssl=here.parties["ben"].tls)
    got = last = 0
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        async with asyncio.timeout(20):
            while data := await reader.read(16 * 1024):
                got, last = got + len(data), now_ms()
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    assert 0 < got < len(here.first_piece)
    assert last < ends + 250


async def test_past_its_queue_a_peer_says_busy_and_when_to_come_back(here: Here) -> None:
    """A member that asks for more than its share at once is told 429, honestly, and keeps what it was granted."""
    here.server.set_limits(256 * 1024)
    tls, token = here.parties["ben"].tls, here.token("ben")
    asked = requests(here.manifest_id)["/v1/swarms/{manifest_id}/pieces/{index}"]
    asking = {asyncio.create_task(here.ask(asked, tls, token)) for _ in range(56)}
    busy: list[tuple[int, str, bytes]] = []
    try:
        async with asyncio.timeout(30):
            while not busy:
                done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                busy += [answer for task in done if (answer := task.result())[0] == 429]
        _, head, body = busy[0]
        told = json.loads(body)
        assert told["code"] == "busy"
        assert 0 < told["retry_after_seconds"] <= 10.0
        assert "retry-after: " in head.lower()
        assert here.server.sendings
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def test_a_right_that_ends_while_its_request_waits_gives_nothing(here: Here) -> None:
    """Whoever waited for a slot is looked at again when it comes: a withdrawal meanwhile counts."""
    queue, tls, token = here.server.queue, here.parties["ben"].tls, here.token("ben")
    now = asyncio.get_running_loop().time()
    taken = 0
    while queue.ask("another", taken - 1, now) is True:
        taken -= 1
    waiting = taken - 1  # the one that found no slot
    here.server._free(waiting)
    asked = requests(here.manifest_id)
    asking = [
        asyncio.create_task(here.ask(asked[f"/v1/swarms/{{manifest_id}}/{path}"], tls, token))
        for path in ("pieces/{index}", "next")
    ]
    async with asyncio.timeout(10):
        while queue.declared(now).queued < len(asking):
            await asyncio.sleep(0.01)
        here.access.revocations.add("boats", EPOCH + 1, user="ben")
        here.server.recheck()
        for ticket in range(taken, 0):
            here.server._free(ticket)
        assert [(await task)[0] for task in asking] == [403, 403]


async def test_who_takes_no_manifest_holds_no_connection(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that asks for a large manifest and does not read it is dropped."""
    monkeypatch.setattr("peer.manifest_sending.BLOCKED_SECONDS_MAX", 0.2)
    (tmp_path / here.manifest_id).write_bytes(bytes(32 << 20))
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port, ssl=here.parties["ben"].tls)
    try:
        writer.write(
            f"GET /v1/swarms/{here.manifest_id}/manifest HTTP/1.1\r\nHost: peer\r\n"
            f"Authorization: Bearer {here.token('ben')}\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")  # and no more: the buffers fill
        await no_connection_is_left(here)
    finally:
        writer.transport.abort()


async def asking_for_the_manifest(
    here: Here, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A request for the manifest, its answer's head read: the status, and the body is still to come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", here.port, ssl=here.parties[name].tls)
    writer.write(
        f"GET /v1/swarms/{here.manifest_id}/manifest HTTP/1.1\r\nHost: peer\r\n"
        f"Authorization: Bearer {here.token(name)}\r\n\r\n".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    return reader, writer, int(head.split()[1])


async def test_a_manifest_ends_with_the_right_to_it(here: Here, tmp_path: Path) -> None:
    """A large one that is on its way when its reader is removed goes no further."""
    here.server.set_limits(1 << 20)
    (tmp_path / here.manifest_id).write_bytes(bytes(32 << 20))
    reader, writer, status = await asking_for_the_manifest(here, "ben")
    try:
        assert status == 200
        assert await reader.readexactly(1 << 16)
        here.access.revocations.add("boats", EPOCH + 1, user="ben")
        here.server.recheck()
        withdrawn = now_ms()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            async with asyncio.timeout(10):
                await reader.readexactly(32 << 20)
        assert now_ms() - withdrawn < 1000
    finally:
        writer.transport.abort()


async def test_manifests_are_sent_to_each_a_few_at_a_time(here: Here, tmp_path: Path) -> None:
    """They need no slot, and are no way to fill this peer's memory and link."""
    here.server.set_limits(1 << 20)
    (tmp_path / here.manifest_id).write_bytes(bytes(32 << 20))
    writers = []
    try:
        for _ in range(PER_PEER_MAX):
            _, writer, status = await asking_for_the_manifest(here, "ben")
            writers.append(writer)
            assert status == 200
        _, writer, status = await asking_for_the_manifest(here, "ben")
        writers.append(writer)
        assert status == 429
        (tmp_path / here.manifest_id).write_bytes(b"small")
        asked = requests(here.manifest_id)["/v1/swarms/{manifest_id}/manifest"]
        eve = here.token("eve")
        assert (await here.ask(asked, here.parties["eve"].tls, eve))[0] == 200, "others need not wait for it"
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_who_asks_for_nothing_holds_no_connection(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are only so many connections: they are for those that ask for something, and ask it whole."""
    monkeypatch.setattr("peer.server.SILENT_SECONDS_MAX", 0.2)
    monkeypatch.setattr("peer.server.BODY_SECONDS_MAX", 0.2)
    half = [
        b"",
        b"GET /v1/hello HTTP/1.1\r\nHost: pe",
        f"POST /v1/swarms/{here.manifest_id}/next HTTP/1.1\r\nHost: peer\r\nContent-Length: 4\r\n"
        f"Authorization: Bearer {here.token('ben')}\r\n\r\n\x81".encode("latin-1"),
    ]
    writers = []
    try:
        for said in half:
            _, writer = await asyncio.open_connection("127.0.0.1", here.port, ssl=here.parties["ben"].tls)
            writers.append(writer)
            writer.write(said)
        await no_connection_is_left(here)
    finally:
        for writer in writers:
            writer.transport.abort()


async def connected(here: Here, name: str, address: str = "127.0.0.1") -> asyncio.StreamWriter | None:
    """A connection that was let in and answered, and is kept; None: it was closed."""
    reader = writer = None
    try:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", here.port, ssl=here.parties[name].tls, local_addr=(address, 0)
        )
        writer.write(b"GET /v1/hello HTTP/1.1\r\nHost: peer\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return writer
    except (OSError, asyncio.IncompleteReadError):
        if writer is not None:
            writer.transport.abort()
        return None


async def test_one_peer_cannot_take_all_connections(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.door.PER_PEER_MAX", 3)
    inside = [await connected(here, "ben") for _ in range(3)]
    try:
        assert all(inside)
        assert await connected(here, "ben") is None
        inside.append(await connected(here, "dora"))
        assert inside[-1], "another peer found no room"
        assert inside[0] is not None
        inside[0].transport.abort()
        async with asyncio.timeout(10):
            while (again := await connected(here, "ben")) is None:
                await asyncio.sleep(0.02)
        inside.append(again)
    finally:
        for writer in filter(None, inside):
            writer.transport.abort()


async def test_one_address_cannot_take_all_connections(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by connections that never shake hands."""
    monkeypatch.setattr("peer.door.PER_ADDRESS_MAX", 4)
    mute = [
        await asyncio.open_connection("127.0.0.1", here.port, local_addr=("127.0.0.3", 0)) for _ in range(4)
    ]
    try:
        assert await connected(here, "ben", "127.0.0.3") is None
        other = await connected(here, "ben", "127.0.0.2")
        assert other, "another address found no room"
        other.transport.abort()
        for _, writer in mute[:2]:
            writer.transport.abort()
        async with asyncio.timeout(10):
            while (again := await connected(here, "ben", "127.0.0.3")) is None:
                await asyncio.sleep(0.02)
        again.transport.abort()
    finally:
        for _, writer in mute:
            writer.transport.abort()
    async with asyncio.timeout(10):
        while here.server._silent:  # nothing is kept of those that never spoke
            await asyncio.sleep(0.02)


async def no_connection_is_left(here: Here) -> None:
    runner = here.server._runner
    assert runner is not None
    assert runner.server is not None
    async with asyncio.timeout(10):
        while runner.server.connections:
            await asyncio.sleep(0.02)
