"""What a new download need not fetch, because this peer has it already: in another version, another group, another name.

Two ways to find a piece: by its hash among all pieces of complete shares here; and, for another version of the same
file, by assembling it from the same paths and offsets (a file that grew or shrank moves all that follows it, so equal
bytes lie in differently cut pieces). Either way the copy is hashed before it counts (`PartStore.copy_from`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from .content import Content
from .manifest import DIGEST_BYTES, Manifest
from .store import PartStore

Spans: TypeAlias = list[tuple[int, int, int]]


class Here:
    """Complete content of this peer. `version`: it is another version of what is to be fetched."""

    def __init__(self, manifest: Manifest, content: Content, *, version: bool) -> None:
        self.manifest = manifest
        self.content = content
        self.version = version


def candidates(manifest: Manifest, here: Sequence[Here]) -> Iterator[tuple[int, Content, Spans]]:
    """Pieces worth copying: (index, from where, which spans there)."""
    wanted: dict[bytes, list[int]] = {}
    for index in range(manifest.pieces):
        wanted.setdefault(manifest.digest(index), []).append(index)
    found: set[int] = set()
    for other in here:
        if other.manifest.layout.algorithm != manifest.layout.algorithm:
            continue
        for at in range(other.manifest.pieces):
            digest = other.manifest.hashes[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
            for index in wanted.pop(digest, ()):
                found.add(index)
                yield index, other.content, other.manifest.layout.spans(at)
    for other in here:
        if not other.version:
            continue
        sizes = {
            entry.path: (number, entry.size_bytes) for number, entry in enumerate(other.manifest.layout.files)
        }
        for index in range(manifest.pieces):
            if index in found:
                continue
            spans = _assembled(manifest, index, sizes)
            if spans is not None:
                found.add(index)
                yield index, other.content, spans


def _assembled(manifest: Manifest, index: int, sizes: dict[str, tuple[int, int]]) -> Spans | None:
    spans: Spans = []
    for file_index, offset, length in manifest.layout.spans(index):
        number, size_bytes = sizes.get(manifest.layout.files[file_index].path, (-1, -1))
        if offset + length > size_bytes:
            return None
        spans.append((number, offset, length))
    return spans


def copy_what_is_here(
    store: PartStore, here: Sequence[Here], found: Callable[[int], None], stopped: Callable[[], bool]
) -> int:
    """Copy all that is worth it into the part; `found` is told of each piece (from this thread). Returns the bytes.
    Blocks."""
    copied = 0
    for index, content, spans in candidates(store.manifest, here):
        if stopped():
            break
        if not store.map.has(index) and store.copy_from(index, content, spans):
            copied += store.manifest.layout.piece_length(index)
            found(index)
    return copied
