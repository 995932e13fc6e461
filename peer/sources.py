"""One peer as a source of pieces: what it has, what it can carry, when it may be asked again. Pure.

Owned here: the measurements of a peer and the rules that follow from them (how deep its pipeline is, when a
request there would finish, how long to leave it alone). Which piece it is asked for is `peer.picker`'s, and the
whole download's course `peer.download`'s.
"""

from __future__ import annotations

import random
from enum import Enum
from typing import Final

from msgspec import Struct

from peer.bitmap import Mask
from peer.rates import Delivery, Latency, Rate
from peer.swarm_events import Fault, Load

DEPTH_MAX: Final = 64
UNKNOWN_RATE: Final = 64 * 1024.0  # bytes per second, of a peer nobody measured: probed, not trusted
STALL_SECONDS_MIN: Final = 3.0
QUEUED_SECONDS_MIN: Final = 12.0  # before the first byte: the request may wait for a slot
STALL_READ_BYTES: Final = 256 * 1024
CONNECT_RETRY_SECONDS: Final = 0.5
CONNECT_RETRY_SECONDS_MAX: Final = 30.0
FAILURE_SECONDS: Final = 0.5
FAILURE_SECONDS_MAX: Final = 30.0


class Stage(Enum):
    """Where a request stands."""

    ASKED = "asked"
    COMING = "coming"
    CHECKING = "checking"


class Request(Struct, gc=False, eq=False):
    """One request in flight. `index` is -1 while the sender has not chosen yet."""

    number: int
    peer: str
    index: int
    length_bytes: int
    asked_at: float
    heard_at: float
    want: Mask = 0
    got_bytes: int = 0
    stage: Stage = Stage.ASKED
    bytes_before: int = 0  # the peer's delivery when it was asked
    alone: bool = False  # nothing else was asked of the peer: its first byte measures the path


class Source:
    """A peer that is or may become a source."""

    __slots__ = (
        "addresses",
        "arrived_pieces",
        "back_at",
        "bytes_got",
        "chooses",
        "complete",
        "connect_at",
        "connect_failures",
        "connecting",
        "delivery",
        "depth_allowed",
        "failures",
        "have",
        "in_flight",
        "in_flight_bytes",
        "latency",
        "leaving",
        "linked",
        "listed",
        "load",
        "peer",
        "pieces_got",
        "rate",
        "refused",
        "reported",
        "requests",
    )

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.addresses: tuple[str, ...] = ()
        self.listed = False  # by a tracker or another peer: worth connecting to
        self.linked = False
        self.connecting = False
        self.connect_failures = 0
        self.connect_at = 0.0
        self.leaving = False
        self.have: Mask = 0
        self.complete = False
        self.chooses = True  # answers `RequestNext`
        self.load: Load | None = None
        self.rate = Rate()
        self.delivery = Delivery()
        self.latency = Latency()
        self.requests: dict[int, Request] = {}  # in any stage
        self.in_flight = 0  # of them, not yet arrived
        self.in_flight_bytes = 0
        self.depth_allowed = DEPTH_MAX  # lowered by "busy", raised by what arrives
        self.arrived_pieces = 0
        self.failures = 0  # since the last good piece
        self.refused = False
        self.back_at = 0.0  # nothing is asked before
        self.reported: set[Fault] = set()
        self.bytes_got = 0
        self.pieces_got = 0

    def ready(self, now: float) -> bool:
        return self.linked and not self.leaving and now >= self.back_at

    def depth(self, piece_bytes: int) -> int:
        """How many requests keep the path full: twice the product of bandwidth and delay, and one that is being
        sent while the next waits. A peer that never sent anything is probed with one."""
        if not self.arrived_pieces:
            return 1
        path_bytes = 2.0 * self.latency.seconds * self.delivery.bytes_per_second
        return min(2 + int(path_bytes / piece_bytes), self.depth_allowed, DEPTH_MAX)

    def bytes_per_second(self, now: float) -> float:
        """What it sends us, measured; declared while not measured; a low guess while neither."""
        measured = self.rate.bytes_per_second(now) if self.bytes_got else 0.0
        if measured > 0:
            return measured
        if self.load is not None and self.load.bytes_per_second > 0:
            return self.load.bytes_per_second / (self.load.sending + 1)
        return UNKNOWN_RATE

    def finish_seconds(self, now: float, length_bytes: int) -> float:
        """When a piece asked of it now would be here: the path, what is asked of it already, and the piece."""
        return self.latency.seconds + (self.in_flight_bytes + length_bytes) / self.bytes_per_second(now)

    def order(self, now: float, length_bytes: int) -> float:
        """Least loaded first: by when one more piece would be here, counting what it says it sends to others."""
        seconds = self.finish_seconds(now, length_bytes)
        if self.load is not None and self.load.slots and self.load.queued:
            seconds *= 1.0 + self.load.queued / self.load.slots
        return seconds

    def silence_seconds_max(self, now: float, started: bool, read_share_bytes_per_second: float) -> float:
        """How long a request may hear nothing before it counts as stalled, relative to the measured rate.
        `read_share_bytes_per_second`: what our own download limit leaves for one request; 0 without a limit."""
        rate = self.bytes_per_second(now) if self.bytes_got else 0.0
        if read_share_bytes_per_second and (not rate or read_share_bytes_per_second < rate):
            rate = read_share_bytes_per_second
        if not started:
            waiting = 4 * self.in_flight_bytes / rate if rate else 0.0
            return max(QUEUED_SECONDS_MIN, min(waiting, 60.0))
        reading = 4 * STALL_READ_BYTES / rate if rate else 0.0
        return max(STALL_SECONDS_MIN, min(reading, 60.0))

    def failed(self, now: float, rng: random.Random, seconds_min: float = 0.0) -> None:
        """Leave it alone for a while, longer each time in a row."""
        self.failures += 1
        pause = min(FAILURE_SECONDS * 2 ** min(self.failures - 1, 8), FAILURE_SECONDS_MAX)
        self.back_at = max(self.back_at, now + max(pause * (0.5 + rng.random()), seconds_min))
        self.depth_allowed = max(1, self.depth_allowed // 2) if self.depth_allowed < DEPTH_MAX else 2

    def busy(self, now: float, rng: random.Random, retry_after_seconds: float) -> None:
        """It said when to come back. Not a failure; it gets fewer requests at once until it proves able."""
        pause = min(max(retry_after_seconds, 0.02), 60.0)
        self.back_at = max(self.back_at, now + pause * (1.0 + 0.25 * rng.random()))
        self.depth_allowed = max(1, self.in_flight)

    def delivered(self, length_bytes: int) -> None:
        """A piece of it was verified."""
        self.failures = 0
        self.refused = False
        self.depth_allowed = min(self.depth_allowed + 1, DEPTH_MAX)
        self.bytes_got += length_bytes
        self.pieces_got += 1

    def not_reached(self, now: float, rng: random.Random) -> None:
        """A link could not be made or broke; when to try again (with jitter: no stampede)."""
        self.connect_failures += 1
        pause = min(CONNECT_RETRY_SECONDS * 2 ** min(self.connect_failures - 1, 8), CONNECT_RETRY_SECONDS_MAX)
        self.connect_at = now + pause * (0.5 + rng.random())
