"""`ps` while no peer runs in the home: what its records say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from .bitmap import from_wire
from .home import Home
from .manifest import Manifest, ManifestError
from .piecemap import PieceMap, PieceMapDamagedError
from .records import Record, Records
from .reports import PsRow, State
from .telling import held_bytes, piece_map, whole_bytes


def rows_at_rest(home: Home, records: Records) -> list[PsRow]:
    """Blocks."""
    return [_row(home, record) for record in records.all()]


def _row(home: Home, record: Record) -> PsRow:
    row = PsRow(
        group=record.group,
        name=record.name,
        state=record.state,
        done_bytes=0 if record.part else whole_bytes(record),
        size_bytes=record.size_bytes,
        rate_bytes_per_second=0.0,
        peers=0,
        manifest_id=record.manifest_id,
        path=record.path,
        reason=record.reason,
    )
    if not record.part:
        return row
    try:
        manifest = Manifest.decode(home.manifest_file(record.manifest_id).read_bytes(), record.manifest_id)
        held_map = PieceMap.load(Path(record.map))
    except (OSError, ManifestError, PieceMapDamagedError):
        return row
    have = from_wire(bytes(held_map.held), manifest.pieces)
    held_map.close()
    layout = manifest.layout
    state = record.state if record.state in (State.PAUSED, State.FAILED) else State.WAITING
    return msgspec.structs.replace(
        row,
        state=state,
        reason=record.reason or ("no peer runs in this home" if state is State.WAITING else ""),
        done_bytes=held_bytes(have, layout.pieces, layout.piece_bytes, layout.size_bytes),
        piece_map=piece_map(have, layout.pieces),
    )
