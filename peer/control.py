"""The control socket: how commands talk to the peer that runs in their home.

Owned here: the wire between the two (length-prefixed msgpack: one call for each connection, progress while it lasts, then
its end), and the caller's side of it. A caller that goes away interrupts its call. The socket lies in
the home, and its mode (0600) says who may talk to it. Left to others: which verbs there are (`remote.py`), what they
do (`session.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from .home import SocketPath
from .reports import Exit, OnProgress, Progress, TrimaranError
from .trouble import of_system

log = logging.getLogger("trimaran.peer.control")

FRAME_BYTES_MAX: Final = 64 << 20
_LENGTH: Final = struct.Struct(">I")

R = TypeVar("R")


class Call(Struct, frozen=True):
    verb: str
    arguments: dict[str, Any]


class Told(Struct, frozen=True, tag="progress"):
    progress: Progress


class Ended(Struct, frozen=True, tag="result"):
    result: Any


class Refused(Struct, frozen=True, tag="error"):
    message: str
    exit_code: int
    code: str
    outcome: Literal["definite", "indefinite"]
    hint: str


_decode_call = msgspec.msgpack.Decoder(Call)
_decode_answer = msgspec.msgpack.Decoder(Told | Ended | Refused)

Handler = Callable[[str, dict[str, Any], OnProgress], Awaitable[Any]]


def _frame(message: Struct) -> bytes:
    body = msgspec.msgpack.encode(message, enc_hook=str)
    return _LENGTH.pack(len(body)) + body


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > FRAME_BYTES_MAX:
        raise ConnectionError("a frame that is too long")
    return await reader.readexactly(length)


class ControlServer:
    """The running peer's side."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)  # the home's lock says that nobody answers there
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            short = SocketPath(self._path)
            try:
                listener.bind(short.path)
            finally:
                short.close()
            # Nobody can connect before it listens; a umask instead would be of all threads' files.
            self._path.chmod(0o600)
            self._server = await asyncio.start_unix_server(self._serve, sock=listener)
        except BaseException:
            listener.close()
            raise

    async def stop(self) -> None:
        """Take no more calls, and interrupt those that run: their callers are told."""
        if self._server is None:
            return
        self._server.close()
        self._path.unlink(missing_ok=True)
        self._server = None
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            call = _decode_call.decode(await _read(reader))
        except (ConnectionError, asyncio.IncompleteReadError, msgspec.DecodeError):
            writer.close()
            return
        work = asyncio.create_task(self._perform(call, writer))
        self._calls.add(work)
        work.add_done_callback(self._calls.discard)
        leaving = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()  # the caller went away
            await asyncio.gather(work, return_exceptions=True)
        finally:
            leaving.cancel()
            writer.close()

    async def _perform(self, call: Call, writer: asyncio.StreamWriter) -> None:
        def tell(progress: Progress) -> None:
            if writer.transport.get_write_buffer_size() < 1 << 20:
                writer.write(_frame(Told(progress)))

        try:
            answer: Struct = Ended(await self._handler(call.verb, call.arguments, tell))
        except TrimaranError as error:
            answer = _refused(error)
        except Exception as error:
            known = of_system(error) if isinstance(error, OSError) else None
            if known is None:
                log.exception("a command's call %s failed", call.verb)
            answer = _refused(known or self._defect(error))
        except asyncio.CancelledError:
            answer = Refused(
                "The running peer was stopped in the middle of it.",
                int(Exit.UNFINISHED),
                "peer-stopped",
                "indefinite",
                "Start it again (trimaran peer run), or repeat this command without it: what is complete is kept.",
            )
            with contextlib.suppress(ConnectionError):
                writer.write(_frame(answer))
            raise
        with contextlib.suppress(ConnectionError):
            writer.write(_frame(answer))
            await writer.drain()

    def _defect(self, error: Exception) -> TrimaranError:
        return TrimaranError(
            f"Something unexpected happened in the running peer ({type(error).__name__}).",
            exit_code=Exit.UNEXPECTED,
            code="unexpected",
            outcome="indefinite",
            hint=f"The details are in {self._path.parent / 'peer.log'}; please report them. "
            "See what it has with: trimaran ps; then repeat the command.",
        )


def _refused(error: TrimaranError) -> Refused:
    return Refused(error.message, int(error.exit_code), error.code, error.outcome, error.hint)


async def call(
    path: Path, verb: str, arguments: dict[str, Any], result: type[R], on_progress: OnProgress | None = None
) -> R:
    """Ask the running peer. Raises TrimaranError, and ConnectionError when nobody answers there."""
    short = SocketPath(path)
    try:
        reader, writer = await asyncio.open_unix_connection(short.path)
    except OSError as error:
        raise ConnectionRefusedError(str(error)) from error
    finally:
        short.close()
    try:
        writer.write(_frame(Call(verb, arguments)))
        await writer.drain()
        while True:
            try:
                answer = _decode_answer.decode(await _read(reader))
            except (ConnectionError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
                raise TrimaranError(
                    "The running peer ended in the middle of it.",
                    exit_code=Exit.UNFINISHED,
                    code="peer-ended",
                    outcome="indefinite",
                    hint="Run the command again; what is complete is kept.",
                ) from error
            if isinstance(answer, Told):
                if on_progress is not None:
                    on_progress(answer.progress)
            elif isinstance(answer, Refused):
                raise TrimaranError(
                    answer.message,
                    exit_code=Exit(answer.exit_code),
                    code=answer.code,
                    outcome=answer.outcome,
                    hint=answer.hint,
                )
            else:
                return msgspec.convert(answer.result, result, strict=False)
    finally:
        writer.close()
