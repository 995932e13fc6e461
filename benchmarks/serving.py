"""What does a served piece cost? The same pieces from one peer, asked for in the way of our own fetcher and, by a header
that it does not send, in a way that aiohttp has to parse; from memory and from an open file, in turns.

    python -m benchmarks.serving [PIECES] [ROUNDS]

The table says CPU seconds of the serving process per 1,000 pieces of 256 KiB (medians); `docs/decisions` quotes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp.web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.api.tokens import Claims, VerifyingKey, sign_token
from peer.access import Access
from peer.bitmap import full_mask
from peer.buffers import BufferPool
from peer.content import Content, OpenFiles
from peer.hashing import Hashing, scan
from peer.manifest import Manifest
from peer.recent import RecentPieces
from peer.server import PieceServer
from peer.swarm import Swarm, Swarms

SIZE_BYTES = 64 << 20
CONNECTIONS = 4
KEY = b"k" * 32  # of a token that is worth nothing outside this benchmark
WAYS = {"as our fetcher asks": "", "by aiohttp": "Accept: */*\r\n"}


async def serve(source: Path, manifest_file: Path, *, from_memory: bool) -> None:
    """Tells its port, then the processor time it has used whenever it is asked with a line."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(2)
    found = scan(source, "sha256")
    manifest = await Hashing(found, 2).run(executor)
    await asyncio.to_thread(manifest_file.write_bytes, manifest.encode())
    content = Content(found.path, found.layout, found.prints)
    swarm = Swarm("s" * 52, manifest, content, full_mask(manifest.pieces))
    swarm.offers["g"] = {"f"}
    swarms, access, pool = Swarms(), Access(), BufferPool(4 * SIZE_BYTES)
    swarms.add(swarm)
    access.set_keys([VerifyingKey("k", Ed25519PrivateKey.from_private_bytes(KEY).public_key())])
    recent = RecentPieces(pool)
    for index in range(manifest.pieces if from_memory else 0):
        buffer = await pool.acquire(manifest.layout.piece_bytes)
        content.read_piece(index, buffer[: manifest.layout.piece_length(index)])
        recent.keep(manifest.id, index, buffer, manifest.layout.piece_length(index), loop.time())

    async def no_links(*_: object) -> aiohttp.web.StreamResponse:
        return aiohttp.web.Response(status=404)

    server = PieceServer(
        peer_id="s" * 52, swarms=swarms, access=access, files=OpenFiles(), executor=executor, recent=recent,
        manifest_file=lambda _: manifest_file, withdraw=lambda *_: None, link=no_links,
    )  # fmt: skip
    _, port = await server.start("127.0.0.1", 0, None)
    print(port, flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(used.ru_utime + used.ru_stime, flush=True)
    os._exit(0)


class Server:
    def __init__(self, source: Path, manifest_file: Path, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving", "serve", str(source), str(manifest_file), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def cpu_seconds(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def ask(port: int, manifest: Manifest, token: str, more: str, pieces: int) -> None:
    """Fetch `pieces` pieces one after the other, and look at nothing but the head's status and length."""
    buffer = bytearray(manifest.layout.piece_bytes + 8192)
    with socket.create_connection(("127.0.0.1", port)) as line:
        for number in range(pieces):
            index = number % manifest.pieces
            line.sendall(
                f"GET /v1/swarms/{manifest.id}/pieces/{index} HTTP/1.1\r\nHost: peer\r\n"
                f"Authorization: Bearer {token}\r\n{more}\r\n".encode()
            )
            filled = line.recv_into(buffer)
            end = buffer.find(b"\r\n\r\n", 0, filled) + 4
            assert buffer.startswith(b"HTTP/1.1 200 "), bytes(buffer[:filled][:80])
            left = end + manifest.layout.piece_length(index) - filled
            while left:
                left -= line.recv_into(buffer, left)


def main() -> None:
    pieces = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    now = time.time_ns() // 1_000_000
    claims = Claims(
        user="u", peer_id="p" * 52, group="g", epoch=1, issued_at_ms=now, expires_at_ms=now + 3_600_000
    )
    token = sign_token(claims, Ed25519PrivateKey.from_private_bytes(KEY), "k")
    figures: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        source, manifest_file = Path(name) / "source", Path(name) / "manifest"
        source.write_bytes(os.urandom(SIZE_BYTES))
        servers = {kind: Server(source, manifest_file, kind) for kind in ("memory", "file")}
        manifest = Manifest.decode(manifest_file.read_bytes())
        for _ in range(rounds):
            for kind, server in servers.items():
                for way, more in WAYS.items():
                    before = server.cpu_seconds()
                    threads = [
                        threading.Thread(
                            target=ask, args=(server.port, manifest, token, more, pieces // CONNECTIONS)
                        )
                        for _ in range(CONNECTIONS)
                    ]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                    used = server.cpu_seconds() - before
                    figures.setdefault((kind, way), []).append(used * 1000 / pieces)
        for server in servers.values():
            server.stop()
    medians = {f"{kind}, {way}": round(statistics.median(seen), 4) for (kind, way), seen in figures.items()}
    print(json.dumps({"cpu_seconds_per_1000_pieces": medians}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(Path(sys.argv[2]), Path(sys.argv[3]), from_memory=sys.argv[4] == "memory"))
    else:
        main()
