"""The journal's bytes: segment headers, records, the head file. Pure; no file is touched here.

A journal is a row of segments, `journal-000000000001.log` and on, and `journal.head`, which names the last of
them. A segment is a header (a checked block, see `checked.py`) and records:

    u32 CRC-32 | u32 length of what follows the kind | u8 kind | ...

    ENTRY   u64 index, u64 term, command      the log's next entry
    TERM    u64 term, u8 voted, name          the node's term and vote from here on
    CUT     u64 index                         entries at and after `index` are no longer in the log; 0: none is
    RESET   u64 index, u64 term               the log is this one entry, whose command nobody needs
    MARK    8 bytes salt, u64 position, u64 commit hint

Each checksum but a mark's is seeded with that of the record before (across segments too), so a record that is
lost, doubled or out of place shows like one that is damaged. Records are counted from 1 over the life of the
journal; the count is a *position*.

A mark begins every batch, and a batch is written only after the one before was synced. So a mark with position
`n` proves that all records before `n` were on the disk, and damage to one of them is damage, not a torn tail.
Marks are found without parsing what precedes them, by their salt: eight random bytes of the segment's header,
which no command can have guessed. A mark's checksum is seeded with 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from zlib import crc32

import msgspec

from cluster.raft.checked import BlockInvalidError, decode_block, encode_block

FORMAT = 1
SEGMENT_MAGIC = b"TRIMJRNL"
HEAD_MAGIC = b"TRIMHEAD"
HEAD_NAME = "journal.head"
HEAD_TEMPORARY = "journal.head.tmp"
_SEGMENT_PREFIX, _SEGMENT_SUFFIX = "journal-", ".log"
_SEGMENT_DIGITS = 12

SALT_BYTES = 8
COMMAND_BYTES_MAX = 64 * 1024 * 1024

ENTRY, TERM, CUT, RESET, MARK = 1, 2, 3, 4, 5

CRC = struct.Struct("<I")
FRAME = struct.Struct("<IIB")
LENGTH_KIND = struct.Struct("<IB")
ENTRY_REST = struct.Struct("<IBQQ")  # all of an entry but checksum and command
WHOLE_ENTRY = struct.Struct("<IIBQQ")  # all of an entry but the command
ENTRY_PAYLOAD = struct.Struct("<QQ")
_TERM_PAYLOAD = struct.Struct("<QB")
_CUT_PAYLOAD = struct.Struct("<Q")
_MARK_PAYLOAD = struct.Struct("<8sQQ")

Entry = tuple[bytes, int, int]


class Identity(msgspec.Struct, frozen=True):
    """Whose journal it is."""

    node_id: str
    cluster_id: str


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True):
    number: int
    node_id: str
    cluster_id: str
    salt: bytes
    position: int  # of the last record before this segment
    chain: int  # the checksum that seeds the segment's first record
    next_index: int  # of the first entry this segment may hold; 0: any
    term: int
    voted_for: str | None
    commit_hint: int


class Head(msgspec.Struct, frozen=True, array_like=True):
    node_id: str
    cluster_id: str
    last_segment: int


@dataclass(slots=True)
class Segment:
    """A segment as the journal remembers it. `first` and `last` bound the entries of the log whose records
    lie in it; both 0 when there is none."""

    number: int
    size_bytes: int
    first: int = 0
    last: int = 0

    def hold(self, first: int, last: int) -> None:
        if first:
            self.first = self.first or first
            self.last = last

    def cut(self, index: int) -> None:
        """Forget the entries at and after `index`."""
        if self.last >= index:
            self.last = index - 1
            if self.last < self.first:
                self.first = self.last = 0


def segment_name(number: int) -> str:
    return f"{_SEGMENT_PREFIX}{number:0{_SEGMENT_DIGITS}d}{_SEGMENT_SUFFIX}"


def segment_number(name: str) -> int | None:
    """The number in a segment's name; None for any other file."""
    digits = name.removeprefix(_SEGMENT_PREFIX).removesuffix(_SEGMENT_SUFFIX)
    if len(digits) == _SEGMENT_DIGITS and digits.isdecimal() and name == segment_name(int(digits)):
        return int(digits)
    return None


def encode_header(header: SegmentHeader) -> bytes:
    return encode_block(SEGMENT_MAGIC, FORMAT, msgspec.msgpack.encode(header))


def decode_header(data: bytes) -> tuple[SegmentHeader, int]:
    """The header and where the records begin. Raises `BlockInvalidError` or `BlockNewerError`."""
    body, end = decode_block(SEGMENT_MAGIC, FORMAT, data)
    try:
        header = msgspec.msgpack.decode(body, type=SegmentHeader)
    except msgspec.DecodeError as error:
        raise BlockInvalidError(str(error)) from error
    return header, end


def encode_head(head: Head) -> bytes:
    return encode_block(HEAD_MAGIC, FORMAT, msgspec.msgpack.encode(head))


def decode_head(data: bytes) -> Head:
    body, end = decode_block(HEAD_MAGIC, FORMAT, data)
    if end != len(data):
        raise BlockInvalidError("something follows its end")
    try:
        return msgspec.msgpack.decode(body, type=Head)
    except msgspec.DecodeError as error:
        raise BlockInvalidError(str(error)) from error


def _record(kind: int, payload: bytes, chain: int) -> tuple[bytes, int]:
    rest = LENGTH_KIND.pack(len(payload), kind) + payload
    crc = crc32(rest, chain)
    return CRC.pack(crc) + rest, crc


def encode_entry(entry: Entry, chain: int) -> tuple[bytes, int]:
    """The record and the checksum that seeds the next. `Journal.add` has the same inline, for speed."""
    command, index, term = entry
    return _record(ENTRY, ENTRY_PAYLOAD.pack(index, term) + command, chain)


def encode_term(term: int, voted_for: str | None, chain: int) -> tuple[bytes, int]:
    name = (voted_for or "").encode()
    return _record(TERM, _TERM_PAYLOAD.pack(term, voted_for is not None) + name, chain)


def encode_cut(index: int, chain: int) -> tuple[bytes, int]:
    return _record(CUT, _CUT_PAYLOAD.pack(index), chain)


def encode_reset(index: int, term: int, chain: int) -> tuple[bytes, int]:
    return _record(RESET, ENTRY_PAYLOAD.pack(index, term), chain)


def encode_mark(salt: bytes, position: int, commit_hint: int) -> bytes:
    """`position` is that of the batch's first record."""
    return _record(MARK, _MARK_PAYLOAD.pack(salt, position, commit_hint), 0)[0]


def mark_after(data: bytes, start: int, salt: bytes) -> int:
    """The highest position among the marks that lie whole at or after offset `start`; 0 when there is none."""
    highest = 0
    at = data.find(salt, start)
    while at >= 0:
        begin = at - FRAME.size
        end = begin + FRAME.size + _MARK_PAYLOAD.size
        if begin >= start and end <= len(data):
            crc, length, kind = FRAME.unpack_from(data, begin)
            if kind == MARK and length == _MARK_PAYLOAD.size and crc32(data[begin + CRC.size : end]) == crc:
                highest = max(highest, _MARK_PAYLOAD.unpack_from(data, at)[1])
        at = data.find(salt, at + 1)
    return highest


class RecordInvalidError(Exception):
    """No whole record lies here. `offset` is where it should begin."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset
        self.reason = reason


@dataclass(slots=True)
class Replay:
    """What reading the records in order yields. Shared by all segments of a journal."""

    log: list[Entry]
    term: int = 0
    voted_for: str | None = None
    commit_hint: int = 0
    position: int = 0
    chain: int = 0
    next_index: int = 0  # 0: any

    def read(self, data: bytes, start: int, salt: bytes, segments: list[Segment]) -> None:
        """Replay the records of the last of `segments`, which begin at `start`.

        Raises `RecordInvalidError` at the first that is not whole; everything before it has been replayed.
        """
        offset, end = start, len(data)
        while offset < end:
            offset = self._read_entries(data, offset, segments[-1])
            if offset < end:
                offset = self._read_other(data, offset, salt, segments)

    def _read_entries(self, data: bytes, offset: int, segment: Segment) -> int:
        """Replay a run of entries; where it ends: at another record, or at one that is not whole."""
        end, log, chain, current = len(data), self.log, self.chain, self.term
        at: int = offset
        append, unpack, whole = log.append, WHOLE_ENTRY.unpack_from, WHOLE_ENTRY.size
        count, next_index = len(log), self.next_index
        while end - at >= whole:
            crc, length, kind, index, term = unpack(data, at)
            following = at + 9 + length
            if kind != ENTRY or length < 16 or following > end:
                break
            body = data[at + 4 : following]
            if crc32(body, chain) != crc or next_index not in (index, 0) or term > current:
                break
            append((body[21:], index, term))
            chain, next_index, at = crc, index + 1, following
        if len(log) > count:
            segment.hold(log[count][1], log[-1][1])
            self.position += len(log) - count
            self.chain, self.next_index = chain, next_index
        return at

    def _read_other(self, data: bytes, offset: int, salt: bytes, segments: list[Segment]) -> int:
        """Replay the one record at `offset`, which is no good entry; where the next begins."""
        payload = offset + FRAME.size
        if payload > len(data):
            raise RecordInvalidError(offset, "the record is cut short")
        crc, length, kind = FRAME.unpack_from(data, offset)
        following: int = payload + length
        if following > len(data):
            raise RecordInvalidError(offset, "the record is cut short")
        if crc32(data[offset + CRC.size : following], 0 if kind == MARK else self.chain) != crc:
            raise RecordInvalidError(offset, "the checksum of the record does not match")
        if kind == MARK and length == _MARK_PAYLOAD.size:
            found_salt, position, commit_hint = _MARK_PAYLOAD.unpack_from(data, payload)
            if found_salt != salt or position != self.position + 1:
                raise RecordInvalidError(offset, "the record belongs elsewhere")
            self.commit_hint = max(self.commit_hint, commit_hint)
            return following
        if kind == TERM and length >= _TERM_PAYLOAD.size:
            term, voted = _TERM_PAYLOAD.unpack_from(data, payload)
            if term < self.term:
                raise RecordInvalidError(offset, f"term {term} follows term {self.term}")
            name = data[payload + _TERM_PAYLOAD.size : following].decode(errors="replace")
            self.term, self.voted_for = term, name if voted else None
        elif kind == CUT and length == _CUT_PAYLOAD.size:
            (index,) = _CUT_PAYLOAD.unpack_from(data, payload)
            self._cut(index, segments)
        elif kind == RESET and length == ENTRY_PAYLOAD.size:
            index, term = ENTRY_PAYLOAD.unpack_from(data, payload)
            self._cut(0, segments)
            self.log.append((b"", index, term))
            segments[-1].hold(index, index)
            self.next_index = index + 1
        elif kind == ENTRY:
            raise RecordInvalidError(offset, "an entry does not belong here")
        else:
            raise RecordInvalidError(offset, f"there is no record of kind {kind} and length {length}")
        self.chain = crc
        self.position += 1
        return following

    def _cut(self, index: int, segments: list[Segment]) -> None:
        for segment in segments:
            segment.cut(index)
        if index == 0 or not self.log or index <= self.log[0][1]:
            self.log.clear()
        else:
            del self.log[index - self.log[0][1] :]
        self.next_index = index
