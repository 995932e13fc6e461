"""Whole answers, written at once.

aiohttp prepares an answer in a dozen steps, for streams, compression, cookies, ranges; an answer of ours
is a head and some bytes of JSON. At thousands of answers a second on a shared core that is a tenth of the
work. Owned here: that one write. Streams and other media stay aiohttp's.
"""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

QUEUED_BYTES: Final = 64 * 1024  # beyond it, wait for the reader
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


class _Date:
    """The `Date` header (RFC 9110, 6.6.1), made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = b"Date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line


_date = _Date()


class Written(web.StreamResponse):
    """An answer as bytes. `headers` are whole lines, each with its end."""

    # What aiohttp's own set-up makes is not needed, so it is not called.
    def __init__(self, status: int, content_type: str, data: bytes, headers: bytes = b"") -> None:
        self._whole_status = status
        self._media = content_type.encode()
        self._data = data
        self._lines = headers
        self._keep_alive = True

    @property
    def status(self) -> int:
        return self._whole_status

    @property
    def keep_alive(self) -> bool:
        return bool(self._keep_alive)

    @property
    def prepared(self) -> bool:
        return False

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        self._request = request
        self._keep_alive = request.keep_alive and request.version >= HttpVersion11
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the caller has gone")
        transport.write(self.whole())
        if not transport.is_closing() and transport.get_write_buffer_size() > QUEUED_BYTES:
            await self._request.writer.drain()

    def whole(self) -> bytes:
        """Head and body."""
        body = self._data
        return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b%b%b" % (
            self._whole_status,
            _REASONS[self._whole_status],
            self._media,
            len(body),
            _date.line(),
            self._lines,
            _KEPT if self._keep_alive else _CLOSED,
            body,
        )


_KEPT: Final = b"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n"
_CLOSED: Final = _KEPT[:-2] + b"Connection: close\r\n\r\n"
