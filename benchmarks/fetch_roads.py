"""Is the peers' own HTTP client worth its code? The same pieces from the same server, checked and written, once through
aiohttp's client and once through `peer.fetch`, in turns.

    python -m benchmarks.fetch_roads [MIB] [ROUNDS]

The table says GB/s and CPU seconds per GB of the downloader alone (medians); `docs/decisions` quotes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import aiohttp.web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cluster.api.tokens import Claims, VerifyingKey, sign_token
from peer.access import Access
from peer.bitmap import full_mask
from peer.buffers import BufferPool
from peer.content import Content, OpenFiles
from peer.fetch import Endpoint, Fetcher
from peer.hashing import Hashing, scan
from peer.line import Head
from peer.manifest import Manifest
from peer.recent import RecentPieces
from peer.server import PieceServer
from peer.store import PartStore
from peer.swarm import Swarm, Swarms

AT_ONCE = 3
KEY = b"k" * 32  # of a token that is worth nothing outside this benchmark


async def serve(source: Path, manifest_file: Path) -> None:
    executor = ThreadPoolExecutor(2)
    found = scan(source, "sha256")
    manifest = await Hashing(found, 2).run(executor)
    await asyncio.to_thread(manifest_file.write_bytes, manifest.encode())
    swarm = Swarm(
        "s" * 52, manifest, Content(found.path, found.layout, found.prints), full_mask(manifest.pieces)
    )
    swarm.offers["g"] = {"f"}
    swarms, access = Swarms(), Access()
    swarms.add(swarm)
    access.set_keys([VerifyingKey("k", Ed25519PrivateKey.from_private_bytes(KEY).public_key())])

    async def no_links(*_: object) -> aiohttp.web.StreamResponse:
        return aiohttp.web.Response(status=404)

    server = PieceServer(
        peer_id="s" * 52, swarms=swarms, access=access, files=OpenFiles(), executor=executor,
        recent=RecentPieces(BufferPool(1 << 20)),
        manifest_file=lambda _: manifest_file, withdraw=lambda *_: None, link=no_links,
    )  # fmt: skip
    _, port = await server.start("127.0.0.1", 0, None)
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    os._exit(0)


async def fetch(road: str, manifest: Manifest, url: str, token: str, folder: Path) -> tuple[float, float]:
    loop = asyncio.get_running_loop()
    executor, pool = ThreadPoolExecutor(2), BufferPool(128 << 20)
    (folder / "maps").mkdir(exist_ok=True)
    store = PartStore.create(manifest, folder / "target", folder / "maps")
    length, swarm = manifest.layout.piece_bytes, f"/v1/swarms/{manifest.id}/pieces"
    indices, checks = iter(range(manifest.pieces)), []
    fetcher = Fetcher()
    session = aiohttp.ClientSession(read_bufsize=8 << 20, auto_decompress=False)

    async def check(index: int, piece: memoryview, buffer: memoryview | None) -> None:
        assert await loop.run_in_executor(executor, store.check_and_write, index, piece)
        if buffer is not None:
            pool.give(buffer)

    async def own() -> None:
        for index in indices:
            buffer = await pool.acquire(length)
            piece = buffer[: manifest.layout.piece_length(index)]

            def landing(_: Head, piece: memoryview = piece) -> memoryview:
                return piece

            request = f"GET {swarm}/{index} HTTP/1.1\r\nHost: p\r\nAuthorization: Bearer {token}\r\n\r\n"
            await fetcher.ask(Endpoint("s" * 52, (url,)), request.encode(), landing)
            checks.append(asyncio.create_task(check(index, piece, buffer)))

    async def theirs() -> None:
        for index in indices:
            async with session.get(
                f"{url}{swarm}/{index}", headers={"Authorization": f"Bearer {token}"}
            ) as answer:
                piece = await answer.read()
            checks.append(asyncio.create_task(check(index, memoryview(piece), None)))

    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    await asyncio.gather(*((own if road == "own" else theirs)() for _ in range(AT_ONCE)))
    await asyncio.gather(*checks)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    await session.close()
    await fetcher.close()
    store.discard()
    return manifest.size_bytes / 1e9 / seconds, cpu / (manifest.size_bytes / 1e9)


def main() -> None:
    mib, rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 512, int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, manifest_file = folder / "source", folder / "manifest"
        with source.open("wb") as file:
            for _ in range(mib):
                file.write(os.urandom(1 << 20))
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fetch_roads", "serve", str(source), str(manifest_file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        manifest = Manifest.decode(manifest_file.read_bytes())
        now = time.time_ns() // 1_000_000
        claims = Claims(
            user="u", peer_id="p" * 52, group="g", epoch=1, issued_at_ms=now, expires_at_ms=now + 3_600_000
        )
        token = sign_token(claims, Ed25519PrivateKey.from_private_bytes(KEY), "k")
        figures: dict[str, list[tuple[float, float]]] = {"aiohttp": [], "own": []}
        for _ in range(rounds):
            for road, seen in figures.items():
                seen.append(asyncio.run(fetch(road, manifest, url, token, folder)))
        server.kill()
        server.wait()
    medians = {
        road: {
            "gb_per_second": statistics.median(r for r, _ in seen),
            "cpu_seconds_per_gb": statistics.median(c for _, c in seen),
        }
        for road, seen in figures.items()
    }
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        main()
