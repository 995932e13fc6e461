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
import socket
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
_MORE_COMES: Final = getattr(socket, "MSG_MORE", 0)


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
        head: bytes,
        content: Content,
        spans: Sequence[tuple[int, int, int]],
        memory: memoryview | None,
    ) -> None:
        """Send a response: its head, then the spans of a share, or `memory` (which stays as it is) in their stead.
        Raises SourceGoneError, CutError, OSError; then the connection is of no use any more."""
        target = _duplicate(sending.transport)
        try:
            while sending.transport.get_write_buffer_size():  # an earlier answer, on its way
                await sending.writable(target.fileno())
            if memory is not None:
                await self._send_memory(sending, target, head, memory)
            else:
                await self._send_files(sending, target, head, content, spans)
        finally:
            target.close()

    async def _send_memory(
        self, sending: Sending, target: socket.socket, head: bytes, data: memoryview
    ) -> None:
        offset = turn = 0
        while offset < len(data):
            stretch = min(STRETCH_BYTES, len(data) - offset)
            if self._pacer.bytes_per_second:
                stretch = await self._paced(sending, stretch)
            sending.check()
            until = offset + stretch
            while offset < until:
                try:
                    count = target.sendmsg([head, data[offset:until]])
                except BlockingIOError:
                    await sending.writable(target.fileno())
                    continue
                count, head = count - len(head[:count]), head[count:]
                offset += count
                turn += count
                self._count(sending, count)
            if turn >= TURN_BYTES:
                turn = 0
                await asyncio.sleep(0)

    async def _send_files(
        self,
        sending: Sending,
        target: socket.socket,
        head: bytes,
        content: Content,
        spans: Sequence[tuple[int, int, int]],
    ) -> None:
        turn = 0
        for file_index, offset, length in spans:
            with self._files.use(content, file_index) as descriptor:
                end = offset + length
                while offset < end:
                    stretch = min(STRETCH_BYTES, end - offset)
                    if self._pacer.bytes_per_second:
                        stretch = await self._paced(sending, stretch)
                    content.check(file_index, descriptor)
                    await self._in_memory(descriptor, offset, stretch)
                    while head:  # held back by the kernel until the first bytes of the piece go with it
                        sending.check()
                        try:
                            head = head[target.send(head, _MORE_COMES) :]
                        except BlockingIOError:
                            await sending.writable(target.fileno())
                    until = offset + stretch
                    while offset < until:
                        sending.check()
                        try:
                            count = os.sendfile(target.fileno(), descriptor, offset, until - offset)
                        except BlockingIOError:
                            await sending.writable(target.fileno())
                            continue
                        if count == 0:
                            raise SourceGoneError(f"{content.file(file_index)} is shorter than it was")
                        offset += count
                        turn += count
                        self._count(sending, count)
                    if turn >= TURN_BYTES:
                        turn = 0
                        await asyncio.sleep(0)

    async def send_tls(
        self,
        sending: Sending,
        writer: AbstractStreamWriter,
        content: Content,
        spans: Sequence[tuple[int, int, int]],
        memory: memoryview | None,
    ) -> None:
        """`send` over TLS, after a head that the writer has."""
        if memory is None:
            await self._send_written(sending, writer, content, spans)
            return
        for offset in range(0, len(memory), TLS_WRITE_BYTES):
            stretch = memory[offset : offset + TLS_WRITE_BYTES]
            while stretch:
                allowed = len(stretch)
                if self._pacer.bytes_per_second:
                    allowed = await self._paced(sending, allowed)
                # A copy: what TLS cannot send at once it keeps, and this memory will hold another piece by then.
                await self._write(sending, writer, bytes(stretch[:allowed]))
                stretch = stretch[allowed:]

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


def _duplicate(transport: asyncio.Transport) -> socket.socket:
    """A socket of our own on the transport's connection: asyncio keeps the transport's descriptor to itself."""
    own = transport.get_extra_info("socket")
    return socket.socket(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))


def _read_ahead(descriptor: int, offset: int, length: int) -> None:
    buffer = bytearray(min(length, 256 << 10))
    end = offset + length
    while offset < end:
        count = os.preadv(descriptor, [memoryview(buffer)[: end - offset]], offset)
        if count == 0:
            return
        offset += count
