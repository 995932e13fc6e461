"""The whole state as bytes and back, in slices of a millisecond or so.

Owned here: the format, and doing it piecemeal. Raft's snapshots (`cluster/raft/`) carry these bytes and
guard them against damage on disk; the checks here tell a foreign or a cut encoding from a whole one.

The format: the magic line, then frames, each `length, CRC-32` (big endian, 32 bits each) and a payload:
one byte for the length of the section's name, the name, MessagePack. The sections are `state` (scalars),
each of `model.TABLES`, `requests`, and last `end` with the number of rows. A table's frame is a map of
rows by key; a nest's is a list of (outer key, map), and an outer key may come in several frames. Rows
are arrays that grow at their end, so an older snapshot is read by newer code. A section that is not
known, like another magic line, means that newer code wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from struct import Struct
from typing import Any, Final
from zlib import crc32

import msgspec

from .model import TABLES, State
from .requests import KeptRequest
from .tables import Nest, Table

MAGIC: Final = b"trimaran state 1\n"
FRAME_BYTES_MAX: Final = 64 << 20
_SLICE_ROWS: Final = 1000
_FAT_SLICE_ROWS: Final = 8  # of rows that are long lists themselves
_FAT: Final = frozenset({"group_logs"})
_HEAD: Final = Struct(">II")

_encoder: Final = msgspec.msgpack.Encoder()


class _Scalars(msgspec.Struct, frozen=True, array_like=True):
    revision: int
    registration: str
    requests_floor_ms: int


def _decoders() -> dict[str, msgspec.msgpack.Decoder[Any]]:
    empty = State()
    decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
        "state": msgspec.msgpack.Decoder(_Scalars),
        "forgotten": msgspec.msgpack.Decoder(dict[str, int]),
        "requests": msgspec.msgpack.Decoder(list[KeptRequest]),
        "end": msgspec.msgpack.Decoder(int),
    }
    for name, row in TABLES.items():
        rows: Any = dict[str, row]  # type: ignore[valid-type]
        nested = isinstance(getattr(empty, name), Nest)
        decoders[name] = msgspec.msgpack.Decoder(list[tuple[str, rows]] if nested else rows)
    return decoders


_DECODERS: Final = _decoders()


def _frame(section: str, body: object) -> bytes:
    name = section.encode()
    payload = bytes((len(name),)) + name + _encoder.encode(body)
    return _HEAD.pack(len(payload), crc32(payload)) + payload


class FrozenMachine:
    """A state at one moment. Taking it costs as much for a million rows as for one."""

    def __init__(self, state: State) -> None:
        self.revision = state.revision
        self._scalars = _Scalars(state.revision, state.registration, state.requests.floor_ms)
        self._tables: list[tuple[str, bool, tuple[dict[str, Any], ...]]] = []
        for name in TABLES:
            table: Table[Any] | Nest[Any] = getattr(state, name)
            self._tables.append((name, isinstance(table, Nest), table.freeze()))
        self._requests, forgotten = state.requests.freeze()
        self._tables.append(("forgotten", False, forgotten))

    def slices(self) -> Iterator[bytes]:
        """The encoding, piece by piece; each takes about a millisecond to make."""
        yield MAGIC + _frame("state", self._scalars)
        count = 0
        for name, nested, shards in self._tables:
            rows_max = _FAT_SLICE_ROWS if name in _FAT else _SLICE_ROWS
            for rows, body in (_nest_bodies if nested else _table_bodies)(shards, rows_max):
                count += rows
                yield _frame(name, body)
        requests = iter(self._requests)
        while body := list(islice(requests, _SLICE_ROWS)):
            count += len(body)
            yield _frame("requests", body)
        yield _frame("end", count)


def _pieces(rows: Mapping[str, Any], rows_max: int) -> Iterator[Mapping[str, Any]]:
    """The rows in pieces of `rows_max`; as they are when they are few."""
    if len(rows) <= rows_max:
        yield rows
        return
    items = iter(rows.items())
    while piece := dict(islice(items, rows_max)):
        yield piece


def _table_bodies(shards: tuple[dict[str, Any], ...], rows_max: int) -> Iterator[tuple[int, Any]]:
    gathered: dict[str, Any] = {}
    for shard in shards:
        if gathered and len(gathered) + len(shard) > rows_max:
            yield len(gathered), gathered
            gathered = {}
        if len(shard) > rows_max:
            for piece in _pieces(shard, rows_max):
                yield len(piece), piece
        else:
            gathered.update(shard)
    if gathered:
        yield len(gathered), gathered


def _nest_bodies(shards: tuple[dict[str, dict[str, Any]], ...], rows_max: int) -> Iterator[tuple[int, Any]]:
    gathered: list[tuple[str, Mapping[str, Any]]] = []
    count = 0
    for shard in shards:
        for outer, rows in shard.items():
            for piece in _pieces(rows, rows_max):
                gathered.append((outer, piece))
                count += len(piece)
                if count >= rows_max:
                    yield count, gathered
                    gathered, count = [], 0
    if gathered:
        yield count, gathered


class Loader:
    """Builds a state beside the live one from the bytes of `FrozenMachine.slices`, cut anywhere."""

    def __init__(self, restore: Callable[[State], None]) -> None:
        self._restore = restore
        self._state = State()
        self._buffer = bytearray()
        self._begun = False
        self._headed = False  # the scalars have come, which are first
        self._ended = False
        self._count = 0
        self._texts: dict[str, str] = {}  # one copy of each name that comes many times

    def feed(self, data: bytes) -> None:
        """Take the next bytes; decoding is `work`'s. Raises `ValueError` for a foreign encoding."""
        if self._ended and not self._buffer and data:
            raise ValueError("bytes follow the end of the state")
        self._buffer += data
        if not self._begun and not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise ValueError("this is no state of Trimaran, or one of a newer version")

    def work(self) -> bool:
        """Decode one frame; False when there is no whole one. Raises `ValueError` for damage."""
        buffer = self._buffer
        if not self._begun:
            if len(buffer) < len(MAGIC):
                return False
            del buffer[: len(MAGIC)]
            self._begun = True
        if len(buffer) < _HEAD.size:
            return False
        length, checksum = _HEAD.unpack_from(buffer)
        if not 2 <= length <= FRAME_BYTES_MAX:
            raise ValueError(f"a frame of {length} bytes is impossible")
        if len(buffer) < _HEAD.size + length:
            return False
        if self._ended:
            raise ValueError("a frame follows the end of the state")
        payload = bytes(buffer[_HEAD.size : _HEAD.size + length])
        del buffer[: _HEAD.size + length]
        if crc32(payload) != checksum:
            raise ValueError("a frame is damaged: its checksum is wrong")
        body_at = 1 + payload[0]
        section = payload[1:body_at].decode("ascii", "replace")
        decoder = _DECODERS.get(section)
        if decoder is None:
            raise ValueError(f"section {section!r} is not known: a newer version wrote it")
        try:
            body = decoder.decode(memoryview(payload)[body_at:])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"section {section!r} is damaged: {error}") from None
        try:
            self._take(section, body)
        except (AssertionError, KeyError) as error:
            raise ValueError(f"section {section!r} contradicts what came before: {error!r}") from None
        return True

    def finish(self) -> None:
        """Swap the loaded state in. Raises `ValueError`, and swaps nothing, if it is not whole."""
        while self.work():
            pass
        if not self._ended or self._buffer:
            raise ValueError("the state is cut off: its end is missing")
        self._restore(self._state)

    def _take(self, section: str, body: Any) -> None:
        state = self._state
        if not self._headed and section != "state":
            raise ValueError(f"section {section!r} comes before the state's beginning")
        if section == "state":
            self._headed = True
            state.revision = body.revision
            state.registration = body.registration
            state.requests.floor_ms = body.requests_floor_ms
        elif section == "end":
            if body != self._count:
                raise ValueError(f"the state has {self._count} rows where {body} were written")
            self._ended = True
            self._texts.clear()
        elif section == "requests":
            self._count += len(body)
            for row in body:
                state.requests.restore(row)
        elif section == "forgotten":
            self._count += len(body)
            for caller, minted_ms in body.items():
                state.requests.forgotten.put(caller, minted_ms)
        elif section in _PLAIN_NESTS:
            nest: Nest[Any] = getattr(state, section)
            for outer, rows in body:
                self._count += len(rows)
                nest.put_all(outer, rows)
        elif section in _NESTED_PUTS:
            put = _NESTED_PUTS[section]
            share = self._texts.setdefault
            for outer, rows in body:
                self._count += len(rows)
                for inner, row in rows.items():
                    put(state, outer, share(inner, inner), row)
        else:
            self._count += len(body)
            put_row = _PUTS[section]
            for key, row in body.items():
                put_row(state, key, row)


def _table_put(name: str) -> Callable[[State, str, Any], None]:
    def put(state: State, key: str, row: Any) -> None:
        getattr(state, name).put(key, row)

    return put


def _put_old_version(state: State, outer: str, manifest_id: str, row: Any) -> None:
    group, name = outer.split("/")
    state.put_old_version(group, name, manifest_id, row)


# How rows are put back: through the methods that keep what is derived, where a table has any.
_PUTS: Final[dict[str, Callable[[State, str, Any], None]]] = {
    "groups": State.put_group,
    "peers": State.put_peer,
    **{name: _table_put(name) for name in ("users", "invitations", "group_logs", "leases", "signing_keys")},
}
_NESTED_PUTS: Final[dict[str, Callable[[State, str, str, Any], None]]] = {
    "files": State.put_file,
    "old_versions": _put_old_version,
    "holdings": State.put_holding,
}
_PLAIN_NESTS: Final = frozenset(
    ("revoked_sessions", "members", "join_requests", "quarantines", "witnesses", "revocations")
)


def digest(state: State) -> bytes:
    """SHA-256 over all rows in the order of their keys. Derived data is not in it: it follows."""
    sha = hashlib.sha256()
    scalars = _Scalars(state.revision, state.registration, state.requests.floor_ms)
    sha.update(_encoder.encode(scalars))
    for name in TABLES:
        table: Table[Any] | Nest[Any] = getattr(state, name)
        sha.update(name.encode() + b"\n")
        if isinstance(table, Nest):
            for outer, rows in sorted(table.items(), key=lambda item: item[0]):
                sha.update(_encoder.encode((outer, sorted(rows.items()))))
        else:
            for item in sorted(table.items(), key=lambda item: item[0]):
                sha.update(_encoder.encode(item))
    sha.update(b"requests\n")
    for item in sorted(state.requests.forgotten.items()):
        sha.update(_encoder.encode(item))
    for row in state.requests:
        sha.update(_encoder.encode(row))
    return sha.digest()


def crumble(state: State, rows_max: int) -> Iterator[None]:
    """Free a state that was replaced, some rows with each step."""
    for name in TABLES:
        table: Table[Any] | Nest[Any] = getattr(state, name)
        while table.crumble(rows_max):
            yield
    while state.requests.crumble(rows_max):
        yield
    derived: tuple[dict[str, Any], ...] = (
        state.owned_counts,
        state.peers_of,
        state.swarms_of,
        state.counts,
        state.hidden_of,
        state.manifest_uses,
    )
    for index in derived:
        while index:
            for _ in range(min(rows_max, len(index))):
                index.popitem()
            yield
