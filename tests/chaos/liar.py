"""A peer that has a right to be there, says it has everything, and sends wrong bytes."""

from __future__ import annotations

import os

from aiohttp import WSMsgType, web

from chaos_tests.asker import Member
from cluster.api import certificates
from cluster.api import types as t
from peer.bitmap import full_mask, to_wire
from peer.frames import Hello, encode
from peer.manifest import Manifest


class Liar:
    def __init__(self, member: Member, group: str, name: str, manifest: Manifest) -> None:
        self.member, self.group, self.name, self.manifest = member, group, name, manifest
        self.deceived: set[str] = set()  # peers that were sent a wrong piece
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Serve, and tell the trackers."""
        app = web.Application()
        swarm = f"/v1/swarms/{self.manifest.id}"
        app.router.add_get(f"{swarm}/manifest", self._manifest)
        app.router.add_get(swarm + r"/pieces/{index:\d+}", self._piece)
        app.router.add_post(f"{swarm}/next", self._next)
        app.router.add_get(f"{swarm}/link", self._link)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        folder = self.member.folder
        tls = certificates.peer_server_context(self.member.ca, folder / "peer.pem", folder / "peer.key")
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.address = f"https://127.0.0.1:{self._runner.addresses[0][1]}"
        fact = t.FactBody(
            group=self.group, name=self.name, manifest_id=self.manifest.id, pieces=self.manifest.pieces, complete=True
        )  # fmt: skip
        body = t.AnnounceBody(addresses=[self.address], facts=[fact], whole=True)
        answer = await self.member.trackers.announce(self.member.peer_id, body)
        assert not answer.dropped

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _manifest(self, request: web.Request) -> web.Response:
        return web.Response(body=self.manifest.encode())

    async def _piece(self, request: web.Request) -> web.Response:
        peer_id = certificates.peer_id_of(request.get_extra_info("ssl_object"))
        assert peer_id is not None
        self.deceived.add(peer_id)
        return self._wrong(int(request.match_info["index"]))

    async def _next(self, request: web.Request) -> web.Response:
        return web.Response(status=204)

    def _wrong(self, index: int) -> web.Response:
        length = self.manifest.layout.piece_length(index)
        return web.Response(body=os.urandom(length), headers={"Trimaran-Piece": str(index)})

    async def _link(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        pieces = self.manifest.pieces
        have = to_wire(full_mask(pieces), pieces)
        await socket.send_bytes(encode(Hello(self.member.peer_id, self.member.token, [self.address], have)))
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                break
        return socket
