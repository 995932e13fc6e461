"""The end of a download: every missing piece is asked for, and some peers hold theirs up. Pure.

Owned here: how far off it is, who is too slow to be given one more piece before it, and which pieces to ask of
another peer as well. The first copy wins, and `peer.download` cancels the others. A second copy costs its sender
bandwidth that others in the swarm could use, so it is asked for only where it would be here well before the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from peer.bitmap import Mask
from peer.requests import Requests
from peer.roster import Roster
from peer.sources import Request, Source, Stage

COPIES_MAX: Final = 3  # of one piece
HELP_RATIO: Final = 1.5  # another copy is asked for where it would be here in two thirds of the time
HELP_SECONDS: Final = 0.05  # and this much sooner
CROWD_RATIO: Final = 1.5  # while others download too, rates change often: the end is not as certain
CROWD_SECONDS: Final = 0.1
BUDGET_EXTRA_PIECES: Final = 2  # so that slow peers cannot keep the whole budget until the end
PAUSE_SECONDS: Final = 0.02  # between two looks, at least; and for each request in flight
PAUSE_SECONDS_PER_REQUEST: Final = 0.001


def pause_seconds(requests: int) -> float:
    """How long to wait until the next look, with so many requests in flight."""
    return max(PAUSE_SECONDS, PAUSE_SECONDS_PER_REQUEST * requests)


def bytes_per_second(roster: Roster, free: Mask, now: float) -> float:
    """What those send together who may be asked for something of `free`, as it was measured. 0 while nothing was."""
    return sum(
        source.bytes_per_second(now)
        for source in roster.sources.values()
        if source.bytes_got and source.ready(now) and source.have & free
    )


def seconds_left(roster: Roster, free: Mask, piece_bytes: int, now: float) -> float:
    """How long what is missing takes at the present rates; 0 where nothing can be said."""
    rate = bytes_per_second(roster, free, now)
    coming = sum(source.in_flight_bytes for source in roster.sources.values() if source.in_flight)
    return (free.bit_count() * piece_bytes + coming) / rate if rate > 0 else 0.0


def somebody_is_faster(roster: Roster, slow: Source, piece_bytes: int, now: float) -> bool:
    """Whether somebody would have sent one more piece in half the time."""
    finish = slow.finish_seconds(now, piece_bytes) / 2
    return any(
        source is not slow
        and source.bytes_got
        and source.ready(now)
        and source.finish_seconds(now, piece_bytes) < finish
        for source in roster.sources.values()
    )


def copies(
    roster: Roster, requests: Requests, piece_bytes: int, room: int, now: float
) -> list[tuple[Source, int]]:
    """At most `room` further requests (whom, which piece): the piece that is held up longest first."""
    helpers = sorted(
        (source.finish_seconds(now, piece_bytes), source.peer, source)
        for source in roster.sources.values()
        if source.ready(now) and source.in_flight < source.depth(piece_bytes)
    )
    if not helpers or room <= 0:
        return []
    threshold = HELP_RATIO * helpers[0][0] + HELP_SECONDS
    held_up = sorted(
        (
            (seconds, request)
            for seconds, request in _expectations(roster, now)
            if seconds > threshold and len(requests.of_piece(request.index)) < COPIES_MAX
        ),
        key=lambda pair: -pair[0],
    )
    asked: list[tuple[Source, int]] = []
    for seconds, request in held_up:
        if len(asked) >= room or not helpers:
            break
        others = requests.of_piece(request.index)
        if any(other.stage is Stage.CHECKING or _seconds(roster, other, now) < seconds for other in others):
            continue  # another copy is nearer
        for at, (finish, _, source) in enumerate(helpers):
            if HELP_RATIO * finish + HELP_SECONDS >= seconds:
                break
            if source.have >> request.index & 1 and all(other.peer != source.peer for other in others):
                asked.append((source, request.index))
                del helpers[at]
                break
    return asked


def _expectations(roster: Roster, now: float) -> Iterator[tuple[float, Request]]:
    for source in roster.sources.values():
        if source.in_flight:
            for request in source.requests.values():
                if request.index >= 0 and request.stage is not Stage.CHECKING:
                    yield _seconds(roster, request, now), request


def _seconds(roster: Roster, request: Request, now: float) -> float:
    """Until a request is likely to end. One that has been silent is expected to be so for as long again."""
    source = roster[request.peer]
    expected = source.in_flight_bytes / source.bytes_per_second(now)
    silence = now - request.heard_at
    return max(expected, silence if silence > 0.5 else 0.0)
