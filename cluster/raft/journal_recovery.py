"""Opening a journal: what may be trusted of what is on the disk, and the words when it may not be.

Owned here: the order of the checks. Dropped: a torn tail, which is what a power loss leaves of the last batch,
and a segment whose creation was cut short; nothing in them was ever acknowledged. Refused, with a
`ConsensusStartError`: damage anywhere else, a missing segment, another node's journal, a foreign or newer format.

The journal's layout is in `journal_format.py`; adding to it is `journal.py`'s.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cluster.consensus import ConsensusStartError
from cluster.raft.checked import BlockForeignError, BlockInvalidError, BlockNewerError, refuse, refuse_newer
from cluster.raft.disk import Disk, File
from cluster.raft.journal_format import (
    HEAD_NAME,
    HEAD_TEMPORARY,
    Head,
    Identity,
    RecordInvalidError,
    Replay,
    Segment,
    SegmentHeader,
    decode_head,
    decode_header,
    encode_head,
    encode_header,
    mark_after,
    segment_name,
    segment_number,
)


@dataclass(slots=True)
class Recovered:
    replay: Replay
    segments: list[Segment]
    salt: bytes
    file: File  # the last segment, open for appending
    dropped_bytes: int = 0


def holds_journal(names: list[str]) -> bool:
    """Whether a folder with these files has ever held a journal that was used."""
    return any(name == HEAD_NAME or (segment_number(name) or 0) > 1 for name in names)


def write_head(disk: Disk, identity: Identity, last_segment: int) -> None:
    """Replace the head file. On return it is on the disk."""
    file = disk.open_append(HEAD_TEMPORARY)
    try:
        file.truncate(0)
        file.append(encode_head(Head(identity.node_id, identity.cluster_id, last_segment)))
        file.sync()
    finally:
        file.close()
    disk.rename(HEAD_TEMPORARY, HEAD_NAME)
    disk.sync_folder()


def create_segment(disk: Disk, header: SegmentHeader, batch: bytes | bytearray) -> File:
    """Write a new segment that begins with `batch`, and name it in the head. On return both are on the disk.

    May be called again after it failed for want of room.
    """
    file = disk.open_append(segment_name(header.number))
    try:
        if file.size():
            file.truncate(0)
        file.append(encode_header(header) + batch)
        file.sync()
        disk.sync_folder()
        write_head(disk, Identity(header.node_id, header.cluster_id), header.number)
    except OSError:
        file.close()
        raise
    return file


def create(disk: Disk, identity: Identity, salt: bytes) -> Recovered:
    """A journal in a folder that holds none."""
    names = disk.list()
    if holds_journal(names):
        raise refuse(
            "This folder holds a journal already",
            HEAD_NAME,
            todo="Start the node on it, or choose another folder.",
        )
    replay = Replay([])
    header = SegmentHeader(1, identity.node_id, identity.cluster_id, salt, 0, 0, 0, 0, None, 0)
    try:
        file = create_segment(disk, header, b"")
    except OSError as error:
        raise _unusable(error) from error
    return Recovered(replay, [Segment(1, file.size())], salt, file)


def recover(disk: Disk, identity: Identity) -> Recovered:
    """Read a journal back. What it returns is on the disk, not only in the kernel's memory."""
    try:
        return _recover(disk, identity)
    except OSError as error:
        raise _unusable(error) from error


def _recover(disk: Disk, identity: Identity) -> Recovered:
    names = disk.list()
    numbers = sorted(number for name in names if (number := segment_number(name)) is not None)
    head = _read_head(disk, names, numbers)
    _check_identity(HEAD_NAME, head.node_id, head.cluster_id, identity)
    _check_numbers(numbers, head.last_segment)
    if numbers[-1] > head.last_segment and not _is_begun(disk, numbers[-1]):
        disk.remove(segment_name(numbers.pop()))
        disk.sync_folder()

    replay, segments, dropped = Replay([]), list[Segment](), 0
    salt = b""
    for number in numbers:
        data = _read_all(disk, segment_name(number))
        header, start = _read_header(data, number, identity)
        salt = header.salt
        if not segments:
            replay.position, replay.chain, replay.next_index = (
                header.position,
                header.chain,
                header.next_index,
            )
        elif (header.position, header.chain) != (replay.position, replay.chain):
            raise refuse(
                "The journal is damaged: a segment does not continue the one before", segment_name(number)
            )
        replay.term, replay.voted_for = header.term, header.voted_for
        replay.commit_hint = max(replay.commit_hint, header.commit_hint)
        segments.append(Segment(number, len(data)))
        try:
            replay.read(data, start, salt, segments)
        except RecordInvalidError as error:
            synced = mark_after(data, error.offset + 1, salt)
            if number != numbers[-1] or synced > replay.position + 1:
                raise refuse(
                    f"The journal is damaged: {error.reason}, and newer records follow it",
                    f"{segment_name(number)}, byte {error.offset} of {len(data)}",
                ) from error
            dropped = len(data) - error.offset
            segments[-1].size_bytes = error.offset
    replay.commit_hint = min(replay.commit_hint, max(replay.next_index - 1, 0))

    file = disk.open_append(segment_name(numbers[-1]))
    if dropped:
        file.truncate(segments[-1].size_bytes)
    file.sync()
    disk.sync_folder()
    if head.last_segment != numbers[-1]:
        write_head(disk, identity, numbers[-1])
    return Recovered(replay, segments, salt, file, dropped)


def _unusable(error: OSError) -> ConsensusStartError:
    return refuse(
        f"The disk failed: {error.strerror or error}",
        str(error.filename or "data folder"),
        todo="Look at the disk and the system's log. When the disk is well and has room, start the node again.",
    )


def _read_all(disk: Disk, name: str) -> bytes:
    file = disk.open_read(name)
    try:
        return file.read_at(0, file.size())
    finally:
        file.close()


def _read_head(disk: Disk, names: list[str], numbers: list[int]) -> Head:
    if HEAD_NAME not in names:
        if numbers:
            raise refuse(f"The journal is incomplete: {HEAD_NAME} is missing", HEAD_NAME)
        raise refuse("There is no journal in the data folder, but this node has taken part before", HEAD_NAME)
    try:
        return decode_head(_read_all(disk, HEAD_NAME))
    except BlockNewerError as error:
        raise refuse_newer("The journal", HEAD_NAME, error) from error
    except BlockInvalidError as error:
        raise refuse(f"The journal's head is damaged: {error}", HEAD_NAME) from error


def _check_identity(name: str, node_id: str, cluster_id: str, identity: Identity) -> None:
    if (node_id, cluster_id) != (identity.node_id, identity.cluster_id):
        raise refuse(
            f"The journal belongs to node {node_id!r} of cluster {cluster_id!r}, "
            f"and this is node {identity.node_id!r} of cluster {identity.cluster_id!r}",
            name,
            todo="Give each node the data folder that is its own. Nothing has been changed.",
        )


def _check_numbers(numbers: list[int], last: int) -> None:
    if not numbers:
        raise refuse("The journal is incomplete: all of its segments are missing", segment_name(last))
    for number, following in itertools.pairwise(numbers):
        if following != number + 1:
            raise refuse("The journal is incomplete: a segment is missing", segment_name(number + 1))
    if numbers[-1] < last:
        raise refuse("The journal is incomplete: a segment is missing", segment_name(numbers[-1] + 1))
    if numbers[-1] > last + 1:
        raise refuse("The journal is incomplete: its head is older than its segments", HEAD_NAME)


def _is_begun(disk: Disk, number: int) -> bool:
    """Whether the segment, which the head does not name yet, was written far enough to be one."""
    try:
        decode_header(_read_all(disk, segment_name(number)))
    except BlockNewerError as error:
        raise refuse_newer("The journal", segment_name(number), error) from error
    except BlockInvalidError:
        return False
    return True


def _read_header(data: bytes, number: int, identity: Identity) -> tuple[SegmentHeader, int]:
    name = segment_name(number)
    try:
        header, start = decode_header(data)
    except BlockNewerError as error:
        raise refuse_newer("The journal", name, error) from error
    except BlockForeignError as error:
        raise refuse(f"The journal holds a file that is not part of it: {error}", name) from error
    except BlockInvalidError as error:
        raise refuse(f"The journal is damaged: a segment's header is invalid: {error}", name) from error
    if header.number != number:
        raise refuse(f"The journal is damaged: the file is segment {header.number}", name)
    _check_identity(name, header.node_id, header.cluster_id, identity)
    return header, start
