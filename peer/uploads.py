"""The sends of this peer that are under way, each with the right it rests on.

Owned here: beginning a send from memory or from the source, ending it when its right is withdrawn or its token ends,
and telling the swarm what became of it. Left to others: requests and slots (`server.py`), moving bytes (`sending.py`),
the decision about a right (`access.py`). Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from cluster.api.tokens import Claims

from .content import OpenFiles, SourceGoneError
from .outlets import Outlet
from .recent import RecentPiece, RecentPieces
from .sender import UploadQueue
from .sending import PieceSender, Sending
from .swarm import Swarm
from .upload_rates import UploadRates

LOOKED_AT_FIRST_MAX: Final = 4  # files
RATE_UNKNOWN: Final = 1e6
MEMORY_SECONDS_MAX: Final = 1.0  # no memory is kept for a send that its own limit makes longer

Ended = Callable[[Sending, Exception | None], None]


class Uploads:
    """`begin`; then `recheck` whenever something was withdrawn; `stop`."""

    def __init__(
        self,
        *,
        seconds_left: Callable[[Claims], float],
        files: OpenFiles,
        recent: RecentPieces,
        executor: Executor,
        withdraw: Callable[[Swarm, str], None],
        rates: UploadRates,
        queue: UploadQueue,
        held: Callable[[int], None],
    ) -> None:
        """`held` is told of a ticket whose send waits for its downloader's own limit."""
        self._seconds_left = seconds_left
        self._recent = recent
        self._withdraw = withdraw
        self._rates = rates
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self.sender = PieceSender(files, executor, rates, queue, held)
        self._sendings: set[Sending] = set()
        self._ending_at = math.inf  # the first token's end that is waited for
        self._ending: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sendings)

    def begin(
        self,
        ticket: int,
        outlet: Outlet,
        claims: Claims,
        swarm: Swarm,
        index: int,
        part: tuple[int, int],
        head: bytes,
        ended: Ended,
    ) -> Sending:
        """Send `part` (start, bytes) of a piece after `head`, in the slot of `ticket`. Calls `ended` once, perhaps
        before it returns.

        A source that is found changed before anything was promised is told by SourceGoneError, raised or given to
        `ended` with nothing `begun`: then the answer can still be 410. Of a piece of many files, the first few are
        looked at beforehand: what is wrong with the others ends the connection when their turn comes."""
        now = self._loop.time()
        start, length = part
        layout = swarm.manifest.layout
        spans = layout.spans_of(index * layout.piece_bytes + start, length)
        limit, own = self._rates.bytes_per_second, self._rates.each_bytes_per_second
        piece = None
        if not own or length <= own * MEMORY_SECONDS_MAX:
            piece = self._recent.take(swarm.manifest_id, index, now)
        if piece is None and len(spans) > 1:
            try:
                self.sender.look(swarm.content, spans[:LOOKED_AT_FIRST_MAX])
            except SourceGoneError as gone:
                self._withdraw(swarm, str(gone))
                raise
        rate = limit or self._queue.bytes_per_second(now) or RATE_UNKNOWN
        swarm.choice.started(claims.peer_id, index, now, length / rate)

        def over(sending: Sending, error: Exception | None) -> None:
            self._over(sending, error, swarm, index, piece)
            ended(sending, error)

        memory = None if piece is None else piece.data[start : start + length]
        sending = Sending(
            self.sender, ticket, outlet, claims, swarm.manifest_id, head, swarm.content, spans, memory, over
        )
        self.sender.start(sending)
        if not sending.over:
            self._sendings.add(sending)
            self._end_with(claims, now)
        return sending

    def _over(
        self, sending: Sending, error: Exception | None, swarm: Swarm, index: int, piece: RecentPiece | None
    ) -> None:
        self._sendings.discard(sending)
        if piece is not None:
            self._recent.let_go(piece)
        swarm.uploaded_bytes += sending.sent_bytes
        if error is not None:
            swarm.choice.failed(sending.claims.peer_id, index)
            if isinstance(error, SourceGoneError):
                self._withdraw(swarm, str(error))

    # --- rights ---------------------------------------------------------------------------------

    def recheck(self, allowed: Callable[[Claims, str], bool]) -> None:
        """Something was withdrawn: end what is `allowed` no more (claims, manifest)."""
        for sending in list(self._sendings):
            if not allowed(sending.claims, sending.manifest_id):
                sending.cut("the right was withdrawn")

    def _end_with(self, claims: Claims, now: float) -> None:
        """A token can end between two looks at all rights: nothing is sent beyond its end."""
        at = now + self._seconds_left(claims)
        if at < self._ending_at:
            if self._ending is not None:
                self._ending.cancel()
            self._ending_at = at
            self._ending = self._loop.call_at(at, self._tokens_end)

    def _tokens_end(self) -> None:
        self._ending, self._ending_at = None, math.inf
        now = self._loop.time()
        for sending in list(self._sendings):
            if self._seconds_left(sending.claims):
                self._end_with(sending.claims, now)
            else:
                sending.cut("the token has expired")

    def stop(self) -> None:
        for sending in list(self._sendings):
            sending.cut("this peer is stopping")
        self.sender.blocked.stop()
        if self._ending is not None:
            self._ending.cancel()
