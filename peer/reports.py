"""What a peer tells the front door: reports, progress, errors, and the session's protocol.

Owned here: the shapes that cross from the engine (in this process, or in `peer run` behind its socket)
to commands, menu and scripts. The JSON that scripts rely on is these structs, field by field.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Final, Literal, Protocol

from msgspec import Struct


class Exit(IntEnum):
    """Exit codes: contracts of `docs/reference/exit-codes.md`."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    CONFLICT = 5
    CLUSTER_UNAVAILABLE = 6
    UNFINISHED = 7
    INTEGRITY = 8
    NO_SPACE = 9
    INTERRUPTED = 130


class TrimaranError(Exception):
    """An error that a person can act on. `message` says what happened; `outcome` whether the thing may
    have taken effect; `hint` what to do next. The front door prints it; nothing else is shown."""

    def __init__(
        self,
        message: str,
        *,
        exit_code: Exit,
        code: str,
        outcome: Literal["definite", "indefinite"] = "definite",
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.code = code
        self.outcome = outcome
        self.hint = hint


class State(StrEnum):
    """`ps` prints [D] for the running ones, [C] for the complete, else the reason."""

    HASHING = "hashing"
    QUEUED = "queued"
    DOWNLOADING = "downloading"
    WAITING = "waiting"  # `reason` says for what (no peers, tracker away and token expired, ...)
    PAUSED = "paused"
    VERIFYING = "verifying"
    COMPLETE = "complete"  # and shared, while the peer runs
    CHANGED = "changed"  # the source changed on disk: no longer offered
    MISSING = "missing"
    FAILED = "failed"


class ShareReport(Struct, frozen=True, kw_only=True):
    group: str
    name: str
    manifest_id: str
    size_bytes: int
    pieces: int


class SourceReport(Struct, frozen=True, kw_only=True):
    peer_id: str
    bytes: int
    pieces: int
    user: str = ""


class GetReport(Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int
    manifest_id: str
    verified: bool
    seconds: float
    received_bytes: int  # this run
    reused_bytes: int  # already here, or copied from this peer's own files
    sources: list[SourceReport]
    sha256: str | None = None  # of a single file, with --checksum


class PsRow(Struct, frozen=True, kw_only=True):
    group: str
    name: str
    state: State
    done_bytes: int
    size_bytes: int
    rate_bytes_per_second: float
    peers: int
    manifest_id: str = ""
    path: str = ""
    reason: str = ""
    upload_bytes_per_second: float = 0.0
    uploaded_bytes: int = 0
    piece_map: str = ""  # one character for each of at most 512 buckets: '0'..'8' eighths held


class Progress(Struct, frozen=True, kw_only=True):
    """Emitted a few times a second during long work."""

    group: str
    name: str
    state: State
    done_bytes: int
    size_bytes: int
    rate_bytes_per_second: float
    seconds_left: float | None
    peers: int
    sources: list[SourceReport]
    piece_map: str = ""
    message: str = ""


OnProgress = Callable[[Progress], None]


class WhoReport(Struct, frozen=True, kw_only=True):
    user: str
    peer_id: str


RATE_MAX: Final = 1 << 40  # bytes per second
UP_EACH_MIN: Final = 16 << 10  # a piece must come whole before its token ends
UP_SLOTS_MAX: Final = 64


class Limits(Struct, frozen=True, kw_only=True):
    """Bytes per second; 0 is unlimited. Kept in the home, so fields are only added, each with a default."""

    up_bytes_per_second: int = 0
    down_bytes_per_second: int = 0
    up_each_bytes_per_second: int = 0  # to one downloader
    up_slots: int = 0  # sends at once; 0: as many as the link needs

    def check(self) -> None:
        """Raises TrimaranError."""
        for value in (self.up_bytes_per_second, self.down_bytes_per_second, self.up_each_bytes_per_second):
            if not 0 <= value <= RATE_MAX:
                raise _no_limit(f"A rate of {value} bytes per second is no limit", "Take 0 to 1024G.")
        if 0 < self.up_each_bytes_per_second < UP_EACH_MIN:
            raise _no_limit(
                f"{self.up_each_bytes_per_second} bytes per second are too few for a downloader",
                "Take at least 16K: a piece must arrive whole while its token holds. 0 is unlimited.",
            )
        if not 0 <= self.up_slots <= UP_SLOTS_MAX:
            raise _no_limit(
                f"There cannot be {self.up_slots} upload slots",
                f"Take 1 to {UP_SLOTS_MAX}, or 0 for as many as the link needs.",
            )


def _no_limit(message: str, hint: str) -> TrimaranError:
    return TrimaranError(f"{message}.", exit_code=Exit.USAGE, code="usage", hint=hint)


class PeerSettings(Struct, frozen=True, kw_only=True):
    """Resolved by the front door from flags, environment, file and defaults, in that order."""

    home: Path
    trackers: tuple[str, ...]  # whole URLs
    ca: Path | None = None
    insecure: bool = False
    listen: str = "0.0.0.0:0"
    advertise: tuple[str, ...] = ()  # whole URLs; empty: derived from the interfaces
    up_bytes_per_second: int = 0
    up_each_bytes_per_second: int = 0
    up_slots: int = 0
    down_bytes_per_second: int = 0
    memory_bytes: int = 128 << 20
    algorithm: Literal["sha256", "blake3"] = "sha256"


class PeerSession(Protocol):
    """One home's peer. Made by `peer.session.open_session(settings)`: the running `peer run` of this
    home when there is one (over its socket), else an engine in this process that holds the home's lock.

    All methods raise `TrimaranError`. Cancelling the awaiting task interrupts the work and keeps its
    progress. These signatures are the socket's wire as well (`remote.py`): parameters and answers are what msgspec
    can convert, and paths.
    """

    remote: bool  # True: talks to a running `peer run`

    async def close(self) -> None: ...

    # people (also usable without an engine; they touch trackers and the home only)
    async def register(self, user: str, password: str, invitation: str = "") -> WhoReport: ...
    async def login(self, user: str, password: str) -> WhoReport: ...
    async def logout(self) -> int: ...  # the revision
    async def whoami(self) -> WhoReport: ...
    async def change_password(self, password: str, new_password: str) -> int: ...

    # sharing
    async def share(
        self,
        path: Path,
        group: str,
        name: str | None,
        *,
        replace: bool,
        algorithm: str | None,
        on_progress: OnProgress,
    ) -> ShareReport:
        """Hash, publish, announce. Returns when it is served to others (and goes on serving while the
        session is open)."""

    async def unshare(self, group: str, name: str) -> int: ...

    # downloading
    async def get(
        self,
        group: str,
        name: str,
        target_folder: Path,
        *,
        down_bytes_per_second: int,
        checksum: bool,
        on_progress: OnProgress,
    ) -> GetReport:
        """Returns when the file is whole under its name; it is offered to others while the session is
        open, and after `peer run` restarts."""

    async def pause(self, group: str, name: str) -> None: ...
    async def resume(self, group: str, name: str) -> None: ...
    async def cancel(self, group: str, name: str) -> None: ...
    async def verify(self, group: str, name: str, on_progress: OnProgress) -> PsRow: ...
    async def ps(self) -> list[PsRow]: ...
    async def limits(self, change: Limits | None) -> Limits: ...

    async def serve_forever(self, on_ready: Callable[[], None] | None = None) -> None:
        """Share what was shared before, resume what was unfinished, answer the socket; until cancelled.
        `on_ready` is called once all that has begun and `listen_address` is known."""

    @property
    def listen_address(self) -> str: ...
