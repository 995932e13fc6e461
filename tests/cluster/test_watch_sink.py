"""A watcher whose connection was torn down must never be what stops a node: applying an entry asks its sink."""

from __future__ import annotations

import asyncio

from cluster.handlers.watching import StreamSink


class TornDown(asyncio.Transport):
    """As asyncio's TLS transport after `abort()`: it says that it is closing, and everything else raises."""

    def is_closing(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        raise AttributeError("'NoneType' object has no attribute '_get_write_buffer_size'")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise AttributeError("'NoneType' object has no attribute '_write_appdata'")


async def test_a_torn_connection_takes_nothing_and_breaks_nothing() -> None:
    sink = StreamSink()
    sink.open(TornDown())
    sink.write(b"news")
    assert sink.queued_bytes() == 0
    assert sink.gone()
