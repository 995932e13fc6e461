"""What a person is told of a share or a download: rows of `ps`, progress, the piece map. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .bitmap import Mask
from .driver import Contribution
from .reports import SourceReport

BUCKETS_MAX = 512


def piece_map(have: Mask, pieces: int) -> str:
    """One character for each of at most 512 buckets: '0'..'8', the eighths that are here (8 only when all are)."""
    if pieces <= 0:
        return ""
    buckets = min(pieces, BUCKETS_MAX)
    shown = []
    for bucket in range(buckets):
        start, end = bucket * pieces // buckets, (bucket + 1) * pieces // buckets
        held = (have >> start & ((1 << (end - start)) - 1)).bit_count()
        shown.append(str(8 * held // (end - start)))
    return "".join(shown)


def held_bytes(have: Mask, pieces: int, piece_bytes: int, size_bytes: int) -> int:
    """The bytes of the pieces that are here."""
    if not pieces:
        return 0
    held = have.bit_count() * piece_bytes
    if have >> (pieces - 1) & 1:
        held -= pieces * piece_bytes - size_bytes
    return held


def sources(contributions: Mapping[str, Contribution]) -> list[SourceReport]:
    """Who gave what, most first."""
    given: Iterable[tuple[str, Contribution]] = (
        (peer_id, each) for peer_id, each in contributions.items() if each.pieces
    )
    return [
        SourceReport(peer_id=peer_id, bytes=each.bytes, pieces=each.pieces, user=each.user)
        for peer_id, each in sorted(given, key=lambda pair: (-pair[1].bytes, pair[0]))
    ]
