"""Tables of immutable rows that freeze in constant time.

Owned here: copy-on-write. A table is cut into shards; freezing hands out the shards as they are and
raises the table's generation; the first write to a shard (or to a nested row set) of an older
generation copies it. So a frozen view never changes, encoding it may take as long as it likes, and
whoever does not write pays nothing. What the rows mean is `model.py`'s.

A shard is chosen by CRC-32 and not by `hash()`: the order of iteration is then the same in every
process, whatever its hash seed. Within a shard it is the order of insertion, which snapshots keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, TypeVar
from zlib import crc32

V = TypeVar("V")

_NO_ROWS: Final[Mapping[str, object]] = {}


class Table(Generic[V]):
    """One row for each key."""

    # Shards are plain dicts of rows the garbage collector need not know: so it leaves them alone, too.
    __slots__ = ("_generation", "_generations", "_mask", "_shards", "_size")

    def __init__(self, shards: int = 256) -> None:
        assert shards & (shards - 1) == 0, "a power of two: the shard is a mask of the CRC"
        self._mask = shards - 1
        self._generation = 0
        self._generations = [0] * shards  # in which each shard may be written in place
        self._shards: list[dict[str, V]] = [{} for _ in range(shards)]
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> V | None:
        try:
            return self._shards[crc32(key.encode()) & self._mask].get(key)
        except UnicodeEncodeError:  # a lone surrogate, from a URL: no row was ever stored under it
            return None

    def put(self, key: str, row: V) -> None:
        shard = self._writable(key)
        before = len(shard)
        shard[key] = row
        self._size += len(shard) - before

    def drop(self, key: str) -> V:
        """Remove the row, which must be there."""
        row = self._writable(key).pop(key)
        self._size -= 1
        return row

    def items(self) -> Iterator[tuple[str, V]]:
        """All rows, in the same order in every process. The table must not change meanwhile."""
        for shard in self._shards:
            yield from shard.items()

    def parts(self) -> Iterator[Iterable[tuple[str, V]]]:
        """All rows, a part at a time. The table may change between two parts, not while one is used; a row
        is always in the same part."""
        for number in range(len(self._shards)):
            if number < len(self._shards):  # else the table was replaced, and is being taken apart
                yield self._shards[number].items()

    def freeze(self) -> tuple[dict[str, V], ...]:
        """The shards as they are now; nobody writes them any more."""
        self._generation += 1
        return tuple(self._shards)

    def crumble(self, rows_max: int) -> bool:
        """Free some rows of a table nobody uses any more; False once it is empty. Freeing a million
        rows at once would hold the interpreter for a quarter of a second."""
        while self._shards:
            shard = self._shards[-1]
            # What a frozen view still holds is freed with the view.
            while shard and self._generations[-1] == self._generation:
                if rows_max == 0:
                    return True
                shard.popitem()
                rows_max -= 1
            self._shards.pop()
            self._generations.pop()
        return False

    def _writable(self, key: str) -> dict[str, V]:
        number = crc32(key.encode()) & self._mask
        shard = self._shards[number]
        if self._generations[number] != self._generation:
            shard = self._shards[number] = shard.copy()
            self._generations[number] = self._generation
        return shard


class Nest(Generic[V]):
    """Rows by an outer and an inner key: the members of a group, the peers of a swarm."""

    __slots__ = ("_frozen", "_outer", "_size", "_written")

    def __init__(self, shards: int = 256) -> None:
        self._outer: Table[dict[str, V]] = Table(shards)
        self._size = 0
        self._frozen = False  # ever
        self._written: set[str] = set()  # outer keys whose rows are newer than the latest freeze

    def __len__(self) -> int:
        return self._size

    def rows(self, outer: str) -> Mapping[str, V]:
        """The rows under one outer key. Read at once: it may be the live mapping."""
        rows = self._outer.get(outer)
        return _NO_ROWS if rows is None else rows  # type: ignore[return-value]

    def get(self, outer: str, inner: str) -> V | None:
        table = self._outer  # written out, for this is what everything does most
        try:
            rows = table._shards[crc32(outer.encode()) & table._mask].get(outer)
        except UnicodeEncodeError:
            return None
        return None if rows is None else rows.get(inner)

    def put(self, outer: str, inner: str, row: V) -> None:
        rows = self._writable(outer)
        before = len(rows)
        rows[inner] = row
        self._size += len(rows) - before

    def put_all(self, outer: str, rows: dict[str, V]) -> None:
        """Put many rows under one outer key. The dict becomes the table's own."""
        if self._outer.get(outer) is None:
            self._outer.put(outer, rows)
            if self._frozen:
                self._written.add(outer)
            self._size += len(rows)
            return
        for inner, row in rows.items():
            self.put(outer, inner, row)

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

    def items(self) -> Iterator[tuple[str, dict[str, V]]]:
        return self._outer.items()

    def freeze(self) -> tuple[dict[str, dict[str, V]], ...]:
        self._frozen = True
        self._written = set()
        return self._outer.freeze()

    def crumble(self, rows_max: int) -> bool:
        """As `Table.crumble`, counting row sets: most are small."""
        return self._outer.crumble(rows_max)

    def _writable(self, outer: str) -> dict[str, V]:
        rows = self._outer.get(outer)
        if rows is None:
            rows = {}
        elif not self._frozen or outer in self._written:
            return rows
        else:
            rows = rows.copy()
        self._outer.put(outer, rows)
        if self._frozen:
            self._written.add(outer)
        return rows
