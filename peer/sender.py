"""Who is sent what, and when: the sender's choice of pieces, and the queue for its upload slots. Pure.

**The sender's choice.** When every downloader picks the rarest piece by itself, they collide while the news of who
has what is in flight; a lone seeder then sends a fifth more than the file. Here the sender picks, among the pieces
that the asker wants and we hold, one with the fewest known copies: copies heard of in the swarm, plus sends in flight.
A send counts until its deadline; if by then the asker has not said that it has the piece, it counts no more, so a slow
or lying asker uses nothing up. Ties are broken by a chance that depends on who sends, so that two full seeders do
not send the same. Once every piece that the asker lacks has a copy out, there is nothing left to choose (204): the
asker knows better.

**Slots.** Few sends at once, so that each piece is soon whole and passed on; more while they do not fill the link
(slow readers). The rest waits, and the next slot is of the downloader that is sent least, in turn where several are sent
as little: so whoever asks on many connections gets no more than its share. Past the queue's bounds the answer is "busy", with an
honest time to come back. Few also where the path is long: sends that share a link evenly end together, the requests
that follow come together, and between the two the link is idle for a round trip.

**Held sends.** Where each downloader has a limit of its own, most sends wait for that and not for the link. A send that
does is *held*: its slot is free for others meanwhile, and its downloader gets no second one, which would only share what
the first is let have. So a slow limit keeps neither the link idle nor anybody else waiting.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import deque
from typing import Final

from msgspec import Struct

from peer.bitmap import Counts, Mask, any_of, full_mask, without
from peer.rates import Rate

UNCONFIRMED_SECONDS_MIN: Final = 2.0
UNCONFIRMED_SECONDS_MAX: Final = 60.0
SENDS_MAX: Final = 4  # while they fill the link: a crowd of 32 ends a tenth sooner with 4 than with 16
SENDS_MAX_UNFILLED: Final = 16
SENDS_MAX_HELD: Final = 64  # with those that are held: each costs a descriptor or two
FILLED_SHARE: Final = 0.7  # of the best rate seen lately
BEST_RATE_MEMORY_SECONDS: Final = 60.0
QUEUE_MAX: Final = 512
QUEUE_PER_DOWNLOADER_MAX: Final = 32
RETRY_AFTER_SECONDS_MIN: Final = 0.05
RETRY_AFTER_SECONDS_MAX: Final = 10.0


class _Send(Struct):
    asker: str
    index: int
    deadline: float
    unconfirmed: bool = True


class SendersChoice:
    """The choice for one swarm. Askers are named by `peer_id`; masks are `peer.bitmap` masks.

    Feed it with what the links say (`linked`, `has`, `unlinked`) and with the sends themselves (`started`, `failed`).
    About 10 µs per choice at 4,096 pieces, whatever the number of askers.
    """

    def __init__(self, peer_id: str, manifest_id: str, pieces: int, have: Mask) -> None:
        self._all = full_mask(pieces)
        self._have = have
        self._known: dict[str, Mask] = {}  # every linked peer's pieces
        self._counted: dict[str, Mask] = {}  # those that count as copies: not of who came with everything
        self._copies = Counts()  # known copies, and sends in flight
        self._sends: dict[str, dict[int, _Send]] = {}  # by asker and piece
        self._deadlines: list[tuple[float, int, _Send]] = []
        self._sequence = 0
        seed = hashlib.sha256(f"{peer_id}/{manifest_id}".encode()).digest()
        self._rng = random.Random(seed)  # noqa: S311 - spreads ties, hides nothing

    def gained(self, pieces: Mask) -> None:
        """We hold these too."""
        self._have |= pieces

    def lost(self, pieces: Mask) -> None:
        """We hold these no more."""
        self._have = without(self._have, pieces)

    def linked(self, peer: str, have: Mask) -> None:
        """A link came up with the peer's bitmap (again: replaces what was known)."""
        self.unlinked(peer)
        self._known[peer] = have
        counted = 0 if have == self._all else have
        self._counted[peer] = counted
        self._copies.add(counted)

    def has(self, peer: str, pieces: Mask) -> None:
        """News from a linked peer. Confirms sends."""
        known = self._known.get(peer)
        if known is None:
            return
        new = without(pieces, known)
        if not new:
            return
        self._known[peer] = known | new
        self._counted[peer] |= new
        self._copies.add(new)
        for send in [send for index, send in self._sends.get(peer, {}).items() if new >> index & 1]:
            self._forget(send)

    def unlinked(self, peer: str) -> None:
        """The link is gone, and with it what the peer was known to have."""
        self._known.pop(peer, None)
        counted = self._counted.pop(peer, 0)
        if counted:
            self._copies.remove(counted)

    def choose(self, asker: str, want: Mask, now: float) -> int | None:
        """The piece to send to `asker`, or None: nothing left that has not gone out once."""
        self._expire(now)
        candidates = want & self._have
        known = self._known.get(asker)
        if known:
            candidates = without(candidates, known)
        if candidates:
            candidates = without(candidates, self._copies.at_least_one())
        if not candidates:
            return None
        return any_of(candidates, self._rng)

    def started(self, asker: str, index: int, now: float, seconds_expected: float) -> None:
        """A send begins, chosen here or asked by index. Counts as a copy for four times as long as it should take."""
        sends = self._sends.setdefault(asker, {})
        if index in sends or self._known.get(asker, 0) >> index & 1:
            return
        patience = min(max(4 * seconds_expected, UNCONFIRMED_SECONDS_MIN), UNCONFIRMED_SECONDS_MAX)
        send = sends[index] = _Send(asker, index, now + patience)
        self._copies.add(1 << index)
        self._sequence += 1
        heapq.heappush(self._deadlines, (send.deadline, self._sequence, send))

    def failed(self, asker: str, index: int) -> None:
        """The send broke off."""
        send = self._sends.get(asker, {}).get(index)
        if send is not None:
            self._forget(send)

    def _forget(self, send: _Send) -> None:
        sends = self._sends[send.asker]
        del sends[send.index]
        if not sends:
            del self._sends[send.asker]
        send.unconfirmed = False
        self._copies.remove(1 << send.index)

    def _expire(self, now: float) -> None:
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now or not deadlines[0][2].unconfirmed):
            send = heapq.heappop(deadlines)[2]
            if send.unconfirmed:
                self._forget(send)


class Busy(Struct, frozen=True):
    """Come back later: 429."""

    retry_after_seconds: float
    queue: int  # how many wait before it


class Declared(Struct, frozen=True):
    """What the link's `load` says."""

    bytes_per_second: float
    sending: int
    slots: int
    queued: int


class UploadQueue:
    """The upload slots of a peer, over all its swarms.

    `ask` a ticket; send when it is granted, at once (True) or by a later `finished` or `expire` that returns it; then
    `finished`. Meanwhile `held` and `went_on`, whenever the send waits for its downloader's own limit. Tickets are the
    caller's: any distinct numbers.
    """

    def __init__(
        self,
        *,
        sends_max: int = SENDS_MAX,
        sends_max_unfilled: int = SENDS_MAX_UNFILLED,
        sends_max_held: int = SENDS_MAX_HELD,
        queue_max: int = QUEUE_MAX,
        queue_per_downloader_max: int = QUEUE_PER_DOWNLOADER_MAX,
    ) -> None:
        self._set(sends_max, sends_max_unfilled, sends_max_held)
        self._queue_max = queue_max
        self._queue_per_downloader_max = queue_per_downloader_max
        self._sending: dict[int, tuple[str, float]] = {}  # ticket -> downloader, since
        self._sending_to: dict[str, int] = {}
        self._held: set[int] = set()  # of those that are sending
        self._held_of: dict[str, int] = {}
        self._waiting: dict[str, deque[int]] = {}
        self._turn: deque[str] = deque()  # downloaders that wait, next first; each once
        self._waiter_of: dict[int, str] = {}
        self._seconds_per_send = 0.0
        self._rate = Rate()
        self._best_rate = 0.0
        self._best_at = 0.0
        self._rate_max = math.inf

    def ask(self, downloader: str, ticket: int, now: float) -> bool | Busy:
        """True: send now. False: wait for the grant. `Busy`: refused."""
        assert ticket not in self._sending and ticket not in self._waiter_of
        queue = self._waiting.get(downloader)
        if queue is None and downloader not in self._held_of and self._may_send(now):
            self._start(downloader, ticket, now)
            return True
        queued = len(self._waiter_of)
        if queued >= self._queue_max or (queue is not None and len(queue) >= self._queue_per_downloader_max):
            return Busy(self.retry_after_seconds(downloader, now), queued)
        if queue is None:
            queue = self._waiting[downloader] = deque()
            self._turn.append(downloader)
        queue.append(ticket)
        self._waiter_of[ticket] = downloader
        return False

    def sends_beside(self, downloader: str) -> int:
        """How many sends a downloader has under way, and 1 while nobody else has any."""
        return self._sending_to.get(downloader, 1) if len(self._sending_to) > 1 else 1

    def moved(self, count: int, now: float) -> None:
        """Bytes went out, for `declared`."""
        self._rate.add(count, now)

    def held(self, ticket: int, now: float) -> list[int]:
        """A send waits for its downloader's own limit: the tickets that are granted now."""
        if ticket not in self._held:
            downloader = self._sending[ticket][0]
            self._held.add(ticket)
            self._held_of[downloader] = self._held_of.get(downloader, 0) + 1
        return self._grant(now)

    def went_on(self, ticket: int) -> None:
        """It is held no more."""
        if ticket in self._held:
            self._held.remove(ticket)
            _less(self._held_of, self._sending[ticket][0])

    def finished(self, ticket: int, now: float) -> list[int]:
        """A send ended, well or not, or a waiting ticket gave up: the tickets that are granted now."""
        downloader = self._waiter_of.pop(ticket, None)
        if downloader is not None:
            queue = self._waiting[downloader]
            queue.remove(ticket)
            if not queue:
                del self._waiting[downloader]
                self._turn.remove(downloader)
            return []
        self.went_on(ticket)
        found = self._sending.pop(ticket, None)
        if found is None:
            return []
        downloader, since = found
        _less(self._sending_to, downloader)
        took = now - since
        self._seconds_per_send += (took - self._seconds_per_send) * (0.125 if self._seconds_per_send else 1.0)
        if not self._sending:
            self._rate.idle(now)
        return self._grant(now)

    def set_slots(self, slots: int, bytes_per_second: float, now: float) -> list[int]:
        """So many sends at once, whatever they wait for; 0: as many as the link needs, which gets `bytes_per_second`
        at most (0: what it carries). The tickets that are granted now. What is being sent goes on."""
        self._rate_max = bytes_per_second or math.inf
        if slots:
            return self.set_limits(now, sends_max=slots, sends_max_unfilled=slots, sends_max_held=slots)
        return self.set_limits(now, sends_max=SENDS_MAX, sends_max_unfilled=SENDS_MAX_UNFILLED)

    def set_limits(
        self, now: float, *, sends_max: int, sends_max_unfilled: int, sends_max_held: int = SENDS_MAX_HELD
    ) -> list[int]:
        """Change the slots: the tickets that are granted now."""
        self._set(sends_max, sends_max_unfilled, sends_max_held)
        return self._grant(now)

    def _set(self, sends_max: int, sends_max_unfilled: int, sends_max_held: int) -> None:
        self._sends_max = sends_max
        self._unfilled_max = max(sends_max, sends_max_unfilled)
        self._held_max = max(self._unfilled_max, sends_max_held)

    def retry_after_seconds(self, downloader: str, now: float) -> float:
        """When a slot is likely to be free for one more of the downloader."""
        if downloader in self._held_of:  # only when what it is being sent has ended
            since = min(since for who, since in self._sending.values() if who == downloader)
            expected = self._seconds_per_send - (now - since)
        else:
            ahead = len(self._waiter_of) + 1
            expected = ahead * self._seconds_per_send / self._slots
        return min(max(expected, RETRY_AFTER_SECONDS_MIN), RETRY_AFTER_SECONDS_MAX)

    def bytes_per_second(self, now: float) -> float:
        """What goes out now, 0 while nothing is known."""
        return self._rate.bytes_per_second(now)

    def declared(self, now: float) -> Declared:
        """For the link's `load` frame: what is so, not what would be liked."""
        return Declared(
            self._rate.bytes_per_second(now), len(self._sending), self._slots, len(self._waiter_of)
        )

    @property
    def _slots(self) -> int:
        """Those that are held take none, up to a number."""
        return min(self._sends_max + len(self._held), self._held_max)

    def _may_send(self, now: float) -> bool:
        if len(self._sending) >= self._held_max:
            return False
        sending = len(self._sending) - len(self._held)
        return sending < self._sends_max or (sending < self._unfilled_max and not self._filled(now))

    def _filled(self, now: float) -> bool:
        rate = self._rate.bytes_per_second(now)
        if rate >= self._best_rate or now - self._best_at > BEST_RATE_MEMORY_SECONDS:
            self._best_rate, self._best_at = rate, now
        return rate >= FILLED_SHARE * min(self._best_rate, self._rate_max)

    def _start(self, downloader: str, ticket: int, now: float) -> None:
        self._sending[ticket] = (downloader, now)
        self._sending_to[downloader] = self._sending_to.get(downloader, 0) + 1
        self._rate.busy(now)

    def _next(self) -> str | None:
        """Whose turn it is: of those that wait and are not held, who is sent least now, and waits longest."""
        found, least = None, 0
        for downloader in self._turn:
            if downloader in self._held_of:
                continue
            sends = self._sending_to.get(downloader, 0)
            if found is None or sends < least:
                found, least = downloader, sends
                if not sends:
                    break
        return found

    def _grant(self, now: float) -> list[int]:
        granted: list[int] = []
        while self._turn and self._may_send(now):
            downloader = self._next()
            if downloader is None:
                break
            self._turn.remove(downloader)
            queue = self._waiting[downloader]
            ticket = queue.popleft()
            del self._waiter_of[ticket]
            self._start(downloader, ticket, now)
            granted.append(ticket)
            if queue:
                self._turn.append(downloader)
            else:
                del self._waiting[downloader]
        return granted


def _less(counts: dict[str, int], name: str) -> None:
    left = counts[name] - 1
    if left:
        counts[name] = left
    else:
        del counts[name]


def too_slow(
    sent_bytes: int, seconds: float, *, bytes_per_second_min: float, grace_seconds: float = 10.0
) -> bool:
    """Whether a reader takes so little that its slot is better given to another."""
    return seconds > grace_seconds and sent_bytes < bytes_per_second_min * seconds
