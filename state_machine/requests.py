"""The memory for request ids: a retry gets the first answer, never a second execution.

Owned here: what is kept, for how long, and what is answered when it is kept no more. Outcomes are kept
in the order of their commands, up to a number and a number of bytes (`limits.REQUESTS_KEPT_*`). Of what
was forgotten, one number is kept for each caller: the latest moment any of its forgotten ids was minted.
An id of that caller from then or before *may* have been executed, so it is refused as too old. The
number is the caller's own, so one user's fast clock cannot make another's ids too old.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

import msgspec

from . import limits
from .outcomes import Applied, Code, Outcome, Refused
from .tables import Table

HASH_BYTES: Final = 32
_CHUNK_ROWS: Final = 512
_ROW_BYTES: Final = 256  # what a row costs in memory beside its bytes

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Applied | Refused)


class KeptRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Two byte strings, for there are very many of these."""

    key: bytes  # the id's 16 bytes, then the caller in UTF-8
    answer: bytes  # SHA-256 of the request, then the encoded outcome

    @property
    def caller(self) -> str:
        return self.key[16:].decode()

    @property
    def minted_ms(self) -> int:
        return int.from_bytes(self.key[:6], "big")  # RFC 9562, 5.7


def request_key(caller: str, request_id: str) -> bytes:
    """The key of a UUID in canonical form."""
    return bytes.fromhex(request_id.replace("-", "")) + caller.encode()


class FrozenRequests:
    """The kept requests at one moment. Chunks are only ever appended to, so a length freezes them."""

    def __init__(self, chunks: tuple[list[KeptRequest], ...], start: int, end: int) -> None:
        self._chunks, self._start, self._end = chunks, start, end

    def __iter__(self) -> Iterator[KeptRequest]:
        last = len(self._chunks) - 1
        for number, chunk in enumerate(self._chunks):
            yield from islice(chunk, self._start if number == 0 else 0, self._end if number == last else None)


class Requests:
    def __init__(self) -> None:
        self.forgotten: Table[int] = Table(64)  # caller: latest minted_ms of its forgotten ids
        self.floor_ms = 0  # for callers whose own number was pruned
        self._by_key: dict[bytes, KeptRequest] = {}
        self._chunks: list[list[KeptRequest]] = [[]]
        self._start = 0  # of the first chunk: rows before it are forgotten
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def kept_bytes(self) -> int:
        return self._bytes

    def find(self, key: bytes) -> KeptRequest | None:
        return self._by_key.get(key)

    def replay(self, kept: KeptRequest, request_hash: bytes, revision: int) -> Outcome:
        """The first answer again, or the refusal of an id that came back with another body."""
        if kept.answer[:HASH_BYTES] != request_hash:
            return Refused(
                Code.REQUEST_MISMATCH,
                "this request id was already used with another request",
                field="Idempotency-Key",
                hint="Use a new id for a new request; repeat a request unchanged.",
                revision=revision,
            )
        first: Outcome = _decoder.decode(memoryview(kept.answer)[HASH_BYTES:])
        return msgspec.structs.replace(first, replayed=True)

    def too_old(self, caller: str, minted_ms: int) -> bool:
        mark = self.forgotten.get(caller)
        return minted_ms <= (self.floor_ms if mark is None else max(mark, self.floor_ms))

    def keep(self, key: bytes, request_hash: bytes, outcome: Outcome) -> None:
        self.restore(KeptRequest(key, request_hash + _encoder.encode(outcome)))
        while len(self._by_key) > limits.REQUESTS_KEPT_MAX or self._bytes > limits.REQUESTS_KEPT_BYTES_MAX:
            self._forget_oldest()

    def restore(self, row: KeptRequest) -> None:
        """Append a row, as kept by `keep` or as read from a snapshot."""
        assert row.key not in self._by_key, "a kept request id is answered from memory, never kept twice"
        self._by_key[row.key] = row
        if len(self._chunks[-1]) == _CHUNK_ROWS:
            self._chunks.append([])
        self._chunks[-1].append(row)
        self._bytes += _row_bytes(row)

    def prune(self, before_ms: int) -> int:
        """Fold the numbers of long silent callers into one for all; how many were folded. An id from
        before the floor is then too old for everyone, so the floor stays well in the past."""
        before_ms -= limits.REQUEST_MARKS_KEPT_MS
        old = [(caller, ms) for caller, ms in self.forgotten.items() if ms < before_ms]
        for caller, ms in old:
            self.forgotten.drop(caller)
            self.floor_ms = max(self.floor_ms, ms)
        return len(old)

    def freeze(self) -> tuple[FrozenRequests, tuple[dict[str, int], ...]]:
        frozen = FrozenRequests(tuple(self._chunks), self._start, len(self._chunks[-1]))
        return frozen, self.forgotten.freeze()

    def __iter__(self) -> Iterator[KeptRequest]:
        return iter(FrozenRequests(tuple(self._chunks), self._start, len(self._chunks[-1])))

    def crumble(self, rows_max: int) -> bool:
        for _ in range(min(rows_max, len(self._by_key))):
            self._by_key.popitem()
        if self._chunks:
            self._chunks.pop()
        return bool(self._by_key or self._chunks)

    def _forget_oldest(self) -> None:
        row = self._chunks[0][self._start]
        self._start += 1
        if self._start == len(self._chunks[0]):
            if len(self._chunks) == 1:
                self._chunks.append([])
            self._chunks.pop(0)
            self._start = 0
        del self._by_key[row.key]
        self._bytes -= _row_bytes(row)
        mark = self.forgotten.get(row.caller)
        if mark is None or row.minted_ms > mark:
            self.forgotten.put(row.caller, row.minted_ms)


def _row_bytes(row: KeptRequest) -> int:
    return _ROW_BYTES + len(row.key) + len(row.answer)
