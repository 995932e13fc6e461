"""Moving a piece's bytes from files to a socket without touching them.

Owned here: the loop around sendfile (plain) and around 256 KiB writes (TLS), the upload rate, the least rate a
reader must take, and ending a send that lost its right. Left to others: who is sent what (`sender.py`), HTTP
(`server.py`), open files (`content.py`).

The event loop must not wait for a disk: before each stretch is sent, its pages are probed (preadv with RWF_NOWAIT);
those that are not in memory are read ahead by the executor. Each stretch is preceded by one fstat, so a source that
changes in the middle of a piece is noticed before the piece's last bytes leave.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final

from aiohttp.abc import AbstractStreamWriter

from cluster.api.tokens import Claims

from .content import Content, OpenFiles, SourceGoneError
from .pacer import Pacer
from .sender import too_slow

STRETCH_BYTES: Final = 1 << 20
TLS_WRITE_BYTES: Final = 256 << 10
LIMITED_BYTES: Final = 64 << 10
TURN_BYTES: Final = 4 << 20  # then the loop gets a turn
BLOCKED_SECONDS_MAX: Final = 10.0
READER_BYTES_PER_SECOND_MIN: Final = 4096.0


class CutError(Exception):
    """The send was ended on purpose: the right was withdrawn, the reader is too slow, or we stop."""


class Sending:
    """One send in progress. `cut` ends it within a turn of the loop."""

    def __init__(self, transport: asyncio.Transport, claims: Claims, manifest_id: str) -> None:
        self.transport = transport
        self.claims = claims
        self.manifest_id = manifest_id
        self.sent_bytes = 0
        self.blocked_seconds = 0.0
        self._reason = ""
        self._waiter: asyncio.Future[None] | None = None

    def cut(self, reason: str) -> None:
        self._reason = self._reason or reason
        self.transport.abort()
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def check(self) -> None:
        if self._reason:
            raise CutError(self._reason)
        if self.transport.is_closing():
            raise ConnectionResetError("the reader went away")

    async def writable(self, descriptor: int) -> None:
        """Wait until the socket takes more; raises CutError for a reader that takes too little."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        began = loop.time()
        loop.add_writer(descriptor, self.wake)
        timer = loop.call_later(BLOCKED_SECONDS_MAX, self.wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            loop.remove_writer(descriptor)
            self._waiter = None
        self.check()
        waited = loop.time() - began
        self.blocked_seconds += waited
        if waited >= BLOCKED_SECONDS_MAX or too_slow(
            self.sent_bytes, self.blocked_seconds, bytes_per_second_min=READER_BYTES_PER_SECOND_MIN
        ):
            self.cut("the reader takes too little")
            self.check()


class PieceSender:
    """Sends spans of shares. One for the whole peer."""

    def __init__(
        self, files: OpenFiles, executor: Executor, pacer: Pacer, moved: Callable[[int, float], None]
    ) -> None:
        self._files = files
        self._executor = executor
        self._pacer = pacer
        self._moved = moved
        self._byte = bytearray(1)
        self._probes = hasattr(os, "RWF_NOWAIT")

    def look(self, content: Content, spans: Sequence[tuple[int, int, int]]) -> None:
        """Raises SourceGoneError if any file of the spans is not what it was."""
        for file_index, _, _ in spans:
            with self._files.use(content, file_index) as descriptor:
                content.check(file_index, descriptor)

    async def send(
        self,
        sending: Sending,
        writer: AbstractStreamWriter,
        content: Content,
        spans: Sequence[tuple[int, int, int]],
        *,
        tls: bool,
    ) -> None:
        """Send spans of a share after the response's head. Raises SourceGoneError, CutError, OSError; then the
        connection is of no use any more."""
        if tls:
            await self._send_written(sending, writer, content, spans)
        else:
            await self._send_files(sending, content, spans)

    async def send_memory(
        self, sending: Sending, writer: AbstractStreamWriter, data: memoryview, *, tls: bool
    ) -> None:
        """`send` for bytes that are in memory and stay as they are. Raises CutError, OSError."""
        socket = sending.transport.get_extra_info("socket")
        target = -1 if tls else os.dup(socket.fileno())
        offset = turn = 0
        try:
            while offset < len(data):
                stretch = min(TLS_WRITE_BYTES if tls else STRETCH_BYTES, len(data) - offset)
                if self._pacer.bytes_per_second:
                    stretch = await self._paced(sending, stretch)
                sending.check()
                if tls:
                    # A copy: what TLS cannot send at once it keeps, and this memory will hold another piece by then.
                    await self._write(sending, writer, bytes(data[offset : offset + stretch]))
                    offset += stretch
                    continue
                try:
                    count = os.write(target, data[offset : offset + stretch])
                except BlockingIOError:
                    await sending.writable(target)
                    continue
                offset += count
                turn += count
                self._count(sending, count)
                if turn >= TURN_BYTES:
                    turn = 0
                    await asyncio.sleep(0)
        finally:
            if target >= 0:
                os.close(target)

    async def _send_files(
        self, sending: Sending, content: Content, spans: Sequence[tuple[int, int, int]]
    ) -> None:
        socket = sending.transport.get_extra_info("socket")
        target = os.dup(socket.fileno())  # asyncio keeps the transport's own descriptor to itself
        turn = 0
        try:
            for file_index, offset, length in spans:
                with self._files.use(content, file_index) as descriptor:
                    end = offset + length
                    while offset < end:
                        stretch = min(STRETCH_BYTES, end - offset)
                        if self._pacer.bytes_per_second:
                            stretch = await self._paced(sending, stretch)
                        content.check(file_index, descriptor)
                        await self._in_memory(descriptor, offset, stretch)
                        until = offset + stretch
                        while offset < until:
                            sending.check()
                            try:
                                count = os.sendfile(target, descriptor, offset, until - offset)
                            except BlockingIOError:
                                await sending.writable(target)
                                continue
                            if count == 0:
                                raise SourceGoneError(f"{content.file(file_index)} is shorter than it was")
                            offset += count
                            turn += count
                            self._count(sending, count)
                            if turn >= TURN_BYTES:
                                turn = 0
                                await asyncio.sleep(0)
        finally:
            os.close(target)

    async def _send_written(
        self,
        sending: Sending,
        writer: AbstractStreamWriter,
        content: Content,
        spans: Sequence[tuple[int, int, int]],
    ) -> None:
        for file_index, offset, length in spans:
            with self._files.use(content, file_index) as descriptor:
                end = offset + length
                while offset < end:
                    stretch = min(TLS_WRITE_BYTES, end - offset)
                    if self._pacer.bytes_per_second:
                        stretch = await self._paced(sending, stretch)
                    content.check(file_index, descriptor)
                    await self._in_memory(descriptor, offset, stretch)
                    data = os.pread(descriptor, stretch, offset)
                    if not data:
                        raise SourceGoneError(f"{content.file(file_index)} is shorter than it was")
                    await self._write(sending, writer, data)
                    offset += len(data)

    async def _write(self, sending: Sending, writer: AbstractStreamWriter, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        sending.check()
        began = loop.time()
        try:
            async with asyncio.timeout(BLOCKED_SECONDS_MAX):
                await writer.write(data)
        except TimeoutError:
            sending.cut("the reader takes too little")
        sending.check()
        sending.blocked_seconds += loop.time() - began
        self._count(sending, len(data))

    async def _paced(self, sending: Sending, stretch: int) -> int:
        stretch = min(stretch, LIMITED_BYTES)
        seconds = self._pacer.take(stretch, asyncio.get_running_loop().time())
        while seconds > 0:  # in short naps, so that a cut is noticed
            await asyncio.sleep(min(seconds, 0.25))
            sending.check()
            seconds -= 0.25
        return stretch

    def _count(self, sending: Sending, count: int) -> None:
        sending.sent_bytes += count
        self._moved(count, asyncio.get_running_loop().time())

    async def _in_memory(self, descriptor: int, offset: int, length: int) -> None:
        if not self._probes:
            return
        try:
            for at in (offset, offset + length - 1):
                os.preadv(descriptor, [self._byte], at, os.RWF_NOWAIT)
        except BlockingIOError:
            await asyncio.get_running_loop().run_in_executor(
                self._executor, _read_ahead, descriptor, offset, length
            )
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._probes = False  # this file system cannot say


def _read_ahead(descriptor: int, offset: int, length: int) -> None:
    buffer = bytearray(min(length, 256 << 10))
    end = offset + length
    while offset < end:
        count = os.preadv(descriptor, [memoryview(buffer)[: end - offset]], offset)
        if count == 0:
            return
        offset += count
