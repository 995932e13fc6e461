"""What a person is told of a share or a download: rows of `ps`, progress, the piece map. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cluster.api import types as t

from .bitmap import Mask
from .driver import Contribution
from .records import Record
from .reports import Progress, PsRow, SourceReport, State
from .swarm import Swarm

if TYPE_CHECKING:
    from .transfer import Transfer

BUCKETS_MAX = 512


def piece_map(have: Mask, pieces: int) -> str:
    """One character for each of at most 512 buckets: '0'..'8', the eighths that are here (8 only when all are)."""
    if pieces <= 0:
        return ""
    if pieces <= BUCKETS_MAX:  # looked at ten times a second, by everyone who watches
        return f"{have:0{pieces}b}"[::-1].replace("1", "8")
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


def progress_of(transfer: Transfer) -> Progress:
    """A download as it is now."""
    driver, state, reason = transfer.driver, transfer.state, transfer.reason
    if transfer.running and driver is not None and driver.waiting is not None:
        state, reason = State.WAITING, driver.waiting.value
    done, size = transfer.done_bytes(), transfer.record.size_bytes
    rate = driver.bytes_per_second() if driver is not None and transfer.running else 0.0
    return Progress(
        group=transfer.record.group,
        name=transfer.record.name,
        state=state,
        done_bytes=done,
        size_bytes=size,
        rate_bytes_per_second=rate,
        seconds_left=(size - done) / rate if rate > 0 else None,
        peers=len(driver.machine.linked_peers) if driver is not None else 0,
        sources=sources(driver.sources) if driver is not None else [],
        piece_map=piece_map(transfer.held, transfer.manifest.pieces),
        message=reason,
    )


def waiting_for_manifest(file: t.FileView, reason: str) -> Progress:
    """A download that cannot begin yet."""
    return Progress(
        group=file.group,
        name=file.name,
        state=State.WAITING,
        done_bytes=0,
        size_bytes=file.size_bytes,
        rate_bytes_per_second=0.0,
        seconds_left=None,
        peers=0,
        sources=[],
        message=reason,
    )


def row_of_transfer(transfer: Transfer) -> PsRow:
    told = progress_of(transfer)
    return PsRow(
        group=told.group,
        name=told.name,
        state=told.state,
        done_bytes=told.done_bytes,
        size_bytes=told.size_bytes,
        rate_bytes_per_second=told.rate_bytes_per_second,
        peers=told.peers,
        manifest_id=transfer.record.manifest_id,
        path=transfer.record.path,
        reason=told.message,
        piece_map=told.piece_map,
    )


def whole_bytes(record: Record) -> int:
    """What is here of something that was whole: all of it, unless its source was edited or is gone. That it is not
    offered (to a group that was lost) takes nothing away."""
    return record.size_bytes if record.state in (State.COMPLETE, State.WAITING) else 0


def row_of_share(record: Record, swarm: Swarm | None) -> PsRow:
    here = record.state is State.COMPLETE
    return PsRow(
        group=record.group,
        name=record.name,
        state=record.state,
        done_bytes=whole_bytes(record),
        size_bytes=record.size_bytes,
        rate_bytes_per_second=0.0,
        peers=len(swarm.links) if swarm is not None else 0,
        manifest_id=record.manifest_id,
        path=record.path,
        reason=record.reason,
        uploaded_bytes=swarm.uploaded_bytes if swarm is not None else 0,
        piece_map=piece_map(swarm.have, swarm.manifest.pieces) if swarm is not None and here else "",
    )
