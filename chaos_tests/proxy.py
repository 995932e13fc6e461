"""A TCP proxy on every link, with a hand on each direction.

Owned here: what a link does to the bytes that pass: let them through, hold them (a partition: neither
end is told, as with a cut cable), delay them, throttle them, reset the connection, duplicate or garble a
chunk. No root needed. Faults are set while connections live and act on them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field

CHUNK_BYTES = 64 * 1024
HELD_BYTES_MAX = (
    4 << 20
)  # what a held direction keeps before it stops reading, as a cut cable's buffers would


@dataclass
class Direction:
    """What happens to bytes going one way. `forward` is from who dialled to who listens."""

    held: bool = False
    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0  # 0: as fast as it goes
    garble_chance: float = 0.0  # of each chunk: one bit is flipped
    duplicate_chance: float = 0.0  # of each chunk: it is sent twice
    reset_chance: float = 0.0  # of each chunk: the connection is reset instead
    passed_bytes: int = 0
    bitten: int = 0  # how often a fault acted on bytes
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def set(self, **faults: float) -> None:
        for name, value in faults.items():
            if name not in (
                "held",
                "delay_seconds",
                "bytes_per_second",
                "garble_chance",
                "duplicate_chance",
                "reset_chance",
            ):
                raise ValueError(f"a direction has no fault {name!r}")
            setattr(self, name, value)
        self._changed.set()

    def heal(self) -> None:
        self.set(
            held=False,
            delay_seconds=0.0,
            bytes_per_second=0.0,
            garble_chance=0.0,
            duplicate_chance=0.0,
            reset_chance=0.0,
        )

    async def until_open(self) -> None:
        while self.held:
            self.bitten += 1
            self._changed.clear()
            await self._changed.wait()


class Link:
    """One listening port that leads to one target."""

    def __init__(self, name: str, target: tuple[str, int], seed: int) -> None:
        self.name, self.target = name, target
        self.forward, self.backward = Direction(), Direction()
        self._random = random.Random(f"{name}/{seed}")
        self._server: asyncio.Server | None = None
        self._open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.refusing = False
        self.port = 0

    async def start(self, port: int = 0) -> int:
        """Listen on loopback; returns the port."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", port, limit=CHUNK_BYTES)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self.port

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, *, forward: bool = True, backward: bool = True) -> None:
        """Hold what passes; connections stay up and hear nothing."""
        if forward:
            self.forward.set(held=True)
        if backward:
            self.backward.set(held=True)

    def heal(self) -> None:
        self.refusing = False
        self.forward.heal()
        self.backward.heal()

    def reset(self) -> int:
        """Reset every connection that is up (RST); returns how many."""
        pairs = list(self._open)
        for pair in pairs:
            for writer in pair:
                _reset(writer)
        return len(pairs)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            _reset(writer)
            return
        try:
            # A cut link does not connect either: the dialler hears nothing until it gives up or it heals.
            await self.forward.until_open()
            await self.backward.until_open()
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=CHUNK_BYTES)
        except OSError:
            _reset(writer)
            return
        pair = (writer, far_writer)
        self._open.add(pair)
        tasks = [
            asyncio.ensure_future(self._carry(reader, far_writer, self.forward)),
            asyncio.ensure_future(self._carry(far_reader, writer, self.backward)),
        ]
        self._tasks.update(tasks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tasks.difference_update(tasks)
            self._open.discard(pair)
            for end in pair:
                end.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        """Read, wait as the link says, write. A queue between keeps delay from becoming a bandwidth limit."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=HELD_BYTES_MAX // CHUNK_BYTES)
        loop = asyncio.get_running_loop()
        sender = asyncio.ensure_future(self._send(queue, writer, way))
        try:
            while data := await reader.read(CHUNK_BYTES):
                if sender.done():
                    return
                await queue.put((loop.time(), data))
            await queue.put((loop.time(), b""))
            await sender
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            came_at, data = await queue.get()
            if way.delay_seconds:
                way.bitten += 1
                await asyncio.sleep(max(0.0, came_at + way.delay_seconds - loop.time()))
            await way.until_open()
            if not data:
                if writer.can_write_eof():
                    writer.write_eof()
                return
            if way.reset_chance and self._random.random() < way.reset_chance:
                way.bitten += 1
                _reset(writer)
                return
            if way.garble_chance and self._random.random() < way.garble_chance:
                way.bitten += 1
                data = _flip(data, self._random)
            repeat = 1
            if way.duplicate_chance and self._random.random() < way.duplicate_chance:
                way.bitten += 1
                repeat = 2
            for _ in range(repeat):
                writer.write(data)
                way.passed_bytes += len(data)
            try:
                await writer.drain()
            except ConnectionError:
                return
            if way.bytes_per_second:
                way.bitten += 1
                await asyncio.sleep(len(data) * repeat / way.bytes_per_second)


def _flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
