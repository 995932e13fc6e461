"""`python -m benchmarks.distance LISTEN_HOST LISTEN_PORT TARGET_HOST TARGET_PORT ROUND_TRIP_SECONDS BYTES_PER_SECOND`:
a link that is long. All connections through it share its rate, each way, and every byte arrives half a round trip later.

A proxy in user space, because not every kernel has netem. What is under way is bounded to a quarter of a second
beyond the path itself, as in a router's queue; past that the sender's TCP feels it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque

QUEUE_SECONDS = 0.25
READ_BYTES = 128 * 1024


class Way:
    """One direction of the link: when what comes now will have passed."""

    def __init__(self, delay_seconds: float, bytes_per_second: float) -> None:
        self.delay_seconds = delay_seconds
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0

    def passes_at(self, count: int, now: float) -> float:
        self._free_at = max(self._free_at, now) + count / self.bytes_per_second
        return self._free_at + self.delay_seconds

    def backlog_seconds(self, now: float) -> float:
        return self._free_at - now


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
    """Read as the link has room, deliver when it is time."""
    loop = asyncio.get_running_loop()
    under_way: deque[tuple[float, bytes]] = deque()
    came = asyncio.Event()

    async def deliver() -> None:
        while True:
            while not under_way:
                came.clear()
                await came.wait()
            at, data = under_way.popleft()
            if (wait := at - loop.time()) > 0:
                await asyncio.sleep(wait)
            if not data:
                return
            writer.write(data)
            await writer.drain()

    delivering = asyncio.create_task(deliver())
    try:
        while not delivering.done():
            data = await reader.read(READ_BYTES)
            under_way.append((way.passes_at(len(data), loop.time()), data))
            came.set()
            if not data:
                await delivering
                return
            if (backlog := way.backlog_seconds(loop.time())) > QUEUE_SECONDS:
                await asyncio.sleep(backlog - QUEUE_SECONDS)
    except ConnectionError:
        return
    finally:
        delivering.cancel()
        writer.close()


async def main() -> None:
    host, port, target_host, target_port, round_trip, rate = sys.argv[1:7]
    forth, back = (Way(float(round_trip) / 2, float(rate)) for _ in range(2))
    lives: set[asyncio.Task[None]] = set()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(
                target_host, int(target_port), limit=READ_BYTES
            )
        except OSError:
            writer.close()
            return
        for life in (carry(reader, far_writer, forth), carry(far_reader, writer, back)):
            task = asyncio.create_task(life)
            lives.add(task)
            task.add_done_callback(lives.discard)

    server = await asyncio.start_server(accepted, host, int(port), limit=READ_BYTES)
    print("ready", flush=True)
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await ending.wait()
    server.close()


asyncio.run(main())
