"""Tables of immutable rows that freeze in constant time.

Owned here: copy-on-write. A table is cut into shards; freezing hands out the shards as they are and
raises the table's generation; the first write to a shard (or to a nested row set) of an older
generation copies it. So a frozen view never changes, encoding it may take as long as it likes, and
whoever does not write pays nothing. What the rows mean is `model.py`'s.

A shard is chosen by CRC-32 and not by `hash()`: the order of iteration is then the same in every
process, whatever its hash seed. Within a shard it is the order of insertion, which snapshots keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Generic, TypeVar
from zlib import crc32

V = TypeVar("V")

_NO_ROWS: Final[Mapping[str, object]] = {}


class Rows(dict[str, V]):
    """Rows by key, stamped with the generation that may still write them in place."""

    __slots__ = ("generation",)
    generation: int


def _rows(generation: int, of: Mapping[str, V] | None = None) -> Rows[V]:
    rows: Rows[V] = Rows() if of is None else Rows(of)
    rows.generation = generation
    return rows


class Table(Generic[V]):
    """One row for each key."""

    __slots__ = ("_generation", "_mask", "_shards", "_size")

    def __init__(self, shards: int = 256) -> None:
        assert shards & (shards - 1) == 0, "a power of two: the shard is a mask of the CRC"
        self._mask = shards - 1
        self._generation = 0
        self._size = 0
        self._shards: list[Rows[V]] = [_rows(0) for _ in range(shards)]

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    @property
    def generation(self) -> int:
        return self._generation

    def get(self, key: str) -> V | None:
        try:
            return self._shards[crc32(key.encode()) & self._mask].get(key)
        except UnicodeEncodeError:  # a lone surrogate, from a URL: no row was ever stored under it
            return None

    def put(self, key: str, row: V) -> None:
        number = crc32(key.encode()) & self._mask
        shard = self._shards[number]
        if shard.generation != self._generation:
            shard = self._shards[number] = _rows(self._generation, shard)
        before = len(shard)
        shard[key] = row
        self._size += len(shard) - before

    def drop(self, key: str) -> V:
        """Remove the row, which must be there."""
        number = crc32(key.encode()) & self._mask
        shard = self._shards[number]
        if shard.generation != self._generation:
            shard = self._shards[number] = _rows(self._generation, shard)
        row = shard.pop(key)
        self._size -= 1
        return row

    def items(self) -> Iterator[tuple[str, V]]:
        """All rows, in the same order in every process. The table must not change meanwhile."""
        for shard in self._shards:
            yield from shard.items()

    def freeze(self) -> tuple[Rows[V], ...]:
        """The shards as they are now; nobody writes them any more."""
        self._generation += 1
        return tuple(self._shards)

    def crumble(self, rows_max: int) -> bool:
        """Free some rows of a table nobody uses any more; False once it is empty. Freeing a million
        rows at once would hold the interpreter for a quarter of a second."""
        while self._shards:
            shard = self._shards[-1]
            if shard.generation != self._generation:  # a frozen view still holds it
                self._shards.pop()
                continue
            while shard and rows_max > 0:
                shard.popitem()
                rows_max -= 1
            if rows_max <= 0:
                return True
            self._shards.pop()
        return False


class Nest(Generic[V]):
    """Rows by an outer and an inner key: the members of a group, the peers of a swarm."""

    __slots__ = ("_outer", "_size")

    def __init__(self, shards: int = 256) -> None:
        self._outer: Table[Rows[V]] = Table(shards)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def outer_count(self) -> int:
        return len(self._outer)

    def rows(self, outer: str) -> Mapping[str, V]:
        """The rows under one outer key. Read at once: it may be the live mapping."""
        rows = self._outer.get(outer)
        return _NO_ROWS if rows is None else rows  # type: ignore[return-value]

    def get(self, outer: str, inner: str) -> V | None:
        rows = self._outer.get(outer)
        return None if rows is None else rows.get(inner)

    def put(self, outer: str, inner: str, row: V) -> None:
        rows = self._writable(outer)
        before = len(rows)
        rows[inner] = row
        self._size += len(rows) - before

    def drop(self, outer: str, inner: str) -> V:
        """Remove the row, which must be there."""
        rows = self._writable(outer)
        row = rows.pop(inner)
        self._size -= 1
        if not rows:
            self._outer.drop(outer)
        return row

    def drop_all(self, outer: str) -> None:
        rows = self._outer.get(outer)
        if rows is not None:
            self._size -= len(rows)
            self._outer.drop(outer)

    def items(self) -> Iterator[tuple[str, Rows[V]]]:
        return self._outer.items()

    def freeze(self) -> tuple[Rows[Rows[V]], ...]:
        return self._outer.freeze()

    def crumble(self, rows_max: int) -> bool:
        """As `Table.crumble`, counting row sets: most are small."""
        return self._outer.crumble(rows_max)

    def _writable(self, outer: str) -> Rows[V]:
        generation = self._outer.generation
        rows = self._outer.get(outer)
        if rows is None:
            rows = _rows(generation)
            self._outer.put(outer, rows)
        elif rows.generation != generation:
            rows = _rows(generation, rows)
            self._outer.put(outer, rows)
        return rows
