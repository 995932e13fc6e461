"""What the download machine hears and what it asks for: the words between `peer.download` and its driver.

The driver (`peer.engine`) owns sockets, disk, hashing and clocks. It feeds events, then performs the actions:

    download.feed(event, now)            as often as something happened, any number at once
    for action in download.actions(now): once after a batch (coalesce: one call per turn of the loop is enough)
    download.wake_at                     call `actions` again by then even if nothing happened; None: no need

`now` is any monotonic clock in seconds, the same for all calls.

Every request has a number, given by the machine; each ends in exactly one of `PieceVerified`, `PieceWrong`,
`PieceFailed`, or in the machine's own `CancelRequest` (after which anything said of it is harmless). In between:

    RequestPiece -> [PieceStarted] -> BytesArrived* -> PieceArrived -> PieceVerified | PieceWrong
    RequestNext  ->  PieceStarted  -> BytesArrived* -> PieceArrived -> PieceVerified | PieceWrong
                 ->  PieceFailed(NOTHING_TO_CHOOSE)

Masks are `peer.bitmap` masks (bit i is piece i). Peers are named by their `peer_id`.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

from msgspec import Struct

from peer.bitmap import Mask


class Failure(Enum):
    """Why a request brought no piece."""

    BUSY = "busy"  # 429; with `retry_after_seconds`
    NOTHING_TO_CHOOSE = "nothing to choose"  # 204 to `RequestNext`: ask by index from now on
    REFUSED = "refused"  # 401, 403: it does not accept our token
    NOT_HELD = "not held"  # 404: it has not that piece, or does not serve this swarm
    WITHDRAWN = "withdrawn"  # 410: its file changed, or its share ended
    STALLED = "stalled"  # the driver's own time limit
    GONE = "gone"  # the connection broke or could not be made
    GARBLED = "garbled"  # too few bytes, too many, another piece, or not the protocol
    LOCAL = "local"  # ours: no memory, no disk; not the peer's fault


class Fault(Enum):
    """What trackers are told of a peer: the `fault` of a report."""

    BAD_PIECE = "bad_piece"
    UNREACHABLE = "unreachable"
    STALLED = "stalled"


class WaitReason(Enum):
    """Why nothing moves. The values are what a person reads."""

    PAUSED = "paused"
    NO_PEERS = "no peer of this file can be reached"
    NO_PEERS_NO_TRACKER = "no peer of this file can be reached, and no tracker answers; trying again"
    PIECES_MISSING = "the peers that can be reached do not have the missing pieces"
    BUSY = "all peers are busy"
    REFUSED = "the peers refuse this peer's token"
    TOKEN_EXPIRED = "the token has expired and no tracker can renew it; goes on when one returns"  # noqa: S105


# ---- events ----------------------------------------------------------------------------------------------------


class PeerJoined(Struct, frozen=True, gc=False):
    """A peer of the swarm, heard of from a tracker or from another peer. Repeats are welcome (new addresses)."""

    peer: str
    addresses: tuple[str, ...]
    complete: bool = False  # as the source says; the link's bitmap decides


class PeerLeft(Struct, frozen=True, gc=False):
    """The trackers no longer list this peer. A live link to it stays in use; a lost one is not made again."""

    peer: str


class LinkUp(Struct, frozen=True, gc=False):
    """A link stands, whoever opened it, and the peer's `hello` with its pieces was read."""

    peer: str
    have: Mask
    latency_seconds: float = 0.0  # a round trip, if measured (the link's ping, or the handshake); 0: unknown


class LinkDown(Struct, frozen=True, gc=False):
    """A link closed, or could not be made after `Connect`."""

    peer: str
    reached: bool = True  # False: the connection was never made
    leaving: bool = False  # it said `gone`: not a fault, and no reason to come back


class Have(Struct, frozen=True, gc=False):
    """News of a peer's pieces; coalesced ones at once."""

    peer: str
    pieces: Mask


class Load(Struct, frozen=True, gc=False):
    """What a peer declares of itself: bytes per second it sends, to how many, with how many slots, how many wait."""

    peer: str
    bytes_per_second: float
    sending: int
    slots: int
    queued: int = 0


class LatencyMeasured(Struct, frozen=True, gc=False):
    """A round trip on the link."""

    peer: str
    seconds: float


class PieceStarted(Struct, frozen=True, gc=False):
    """The head of the answer arrived: this piece comes (the sender's choice, or the one that was asked)."""

    request: int
    index: int


class BytesArrived(Struct, frozen=True, gc=False):
    """Some bytes of the body arrived. Optional but for long bodies: about every 100 ms is enough."""

    request: int
    count: int


class PieceArrived(Struct, frozen=True, gc=False):
    """The whole body arrived and is being checked; the next one may be asked of that peer."""

    request: int


class PieceVerified(Struct, frozen=True, gc=False):
    """The piece's hash is right and it is written. Idempotent: a second copy of a piece counts as a duplicate."""

    request: int
    index: int


class PieceWrong(Struct, frozen=True, gc=False):
    """The piece's bytes do not have its hash: the peer is cut off for this swarm."""

    request: int


class PieceFailed(Struct, frozen=True, gc=False):
    """No piece came of this request."""

    request: int
    failure: Failure
    retry_after_seconds: float = 0.0


class PiecesFound(Struct, frozen=True, gc=False):
    """Pieces got without the network: copied from this peer's own files, and verified."""

    pieces: Mask


class PiecesLost(Struct, frozen=True, gc=False):
    """Pieces that are no longer on disk as they were: to be fetched again."""

    pieces: Mask


class Budget(Struct, frozen=True, gc=False):
    """How many pieces may be in memory for this download at once, asked for or being checked (at least 1), and
    the rate at which we read, if it is limited (a slow reader must not take its peers for stalled)."""

    pieces: int
    bytes_per_second: float = 0.0


class TrackersAway(Struct, frozen=True, gc=False):
    """No tracker answers. Downloads go on with the peers they know."""


class TrackersBack(Struct, frozen=True, gc=False):
    """A tracker answers again."""


class TokenExpired(Struct, frozen=True, gc=False):
    """The token's time is over and it could not be renewed: nothing may be asked."""


class TokenRenewed(Struct, frozen=True, gc=False):
    """There is a valid token (also after `REFUSED`)."""


class Pause(Struct, frozen=True, gc=False):
    """Ask for nothing until `Resume`."""


class Resume(Struct, frozen=True, gc=False):
    """Go on."""


Event: TypeAlias = (
    PeerJoined
    | PeerLeft
    | LinkUp
    | LinkDown
    | Have
    | Load
    | LatencyMeasured
    | PieceStarted
    | BytesArrived
    | PieceArrived
    | PieceVerified
    | PieceWrong
    | PieceFailed
    | PiecesFound
    | PiecesLost
    | Budget
    | TrackersAway
    | TrackersBack
    | TokenExpired
    | TokenRenewed
    | Pause
    | Resume
)


# ---- actions ---------------------------------------------------------------------------------------------------


class Connect(Struct, frozen=True, gc=False):
    """Open a link to this peer (try its addresses side by side); answer with `LinkUp` or `LinkDown`."""

    peer: str
    addresses: tuple[str, ...]


class DropPeer(Struct, frozen=True, gc=False):
    """Close the link. `banned`: it sent a wrong piece; accept nothing from it in this swarm again, nor serve it."""

    peer: str
    reason: str
    banned: bool = False


class RequestPiece(Struct, frozen=True, gc=False):
    """Fetch piece `index` (`length_bytes` long) from `peer`."""

    request: int
    peer: str
    index: int
    length_bytes: int


class RequestNext(Struct, frozen=True, gc=False):
    """Fetch from `peer` whichever of `want` it chooses. An answer with a piece outside `want` is
    `PieceFailed(GARBLED)`."""

    request: int
    peer: str
    want: Mask


class CancelRequest(Struct, frozen=True, gc=False):
    """The request's piece is no longer wanted from there. Let go of its buffer; nothing need be answered."""

    request: int


class PushHave(Struct, frozen=True, gc=False):
    """Tell every linked peer of these new pieces, in one frame."""

    pieces: Mask


class ReportPeer(Struct, frozen=True, gc=False):
    """Tell a tracker, when one answers."""

    peer: str
    fault: Fault


class FindPeers(Struct, frozen=True, gc=False):
    """Ask a tracker (and linked peers) for the swarm as it is now; the answers come as `PeerJoined`."""


class Waiting(Struct, frozen=True, gc=False):
    """Nothing moves, and why. Said once per reason; `Moving` takes it back."""

    reason: WaitReason


class Moving(Struct, frozen=True, gc=False):
    """Pieces are being fetched (again)."""


class Done(Struct, frozen=True, gc=False):
    """Every piece is here. Said once (again after `PiecesLost`)."""


Action: TypeAlias = (
    Connect
    | DropPeer
    | RequestPiece
    | RequestNext
    | CancelRequest
    | PushHave
    | ReportPeer
    | FindPeers
    | Waiting
    | Moving
    | Done
)
