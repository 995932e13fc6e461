"""A swarm of hundreds in one process, on a clock that only moves when something happens.

Real: every peer's `Download`, `SendersChoice`, `News` and `UploadQueue`. Modelled: links (upload and download rates, one-way
delay; the flows of a peer share its link evenly, and a flow moves at the lesser of its two shares), the tracker
(tells who is in the swarm, gives tokens, may be away), hashing (a fixed delay), lies and deaths. No bytes exist: a piece is a number.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from peer import swarm_events as ev
from peer.bitmap import full_mask, without
from peer.download import Download
from peer.manifest import piece_bytes_for
from peer.news import News
from peer.sender import Busy, SendersChoice, UploadQueue
from peer.swarm_events import Failure

UNLIMITED = 1e12
HASH_BYTES_PER_SECOND = 1.5e9
PROGRESS_SECONDS = 0.2
HEADER_BYTES = 300
TOKEN_RETRY_SECONDS = 10.0  # while no tracker answers


@dataclass(eq=False)
class Flow:
    """One request at its sender, from the moment it arrives there."""

    asker: SimPeer
    server: SimPeer
    request: int
    index: int
    want: int = 0
    ticket: int = 0
    remaining: float = 0.0
    rate: float = 0.0
    updated_at: float = 0.0
    version: int = 0
    reported: float = 0.0
    state: str = "queued"  # queued, moving, over


@dataclass(eq=False)
class SimPeer:
    """One peer. `up` and `down` are bytes per second, `delay` seconds one way to the middle of the network."""

    sim: Swarm
    name: str
    up: float
    down: float
    delay: float
    have: int
    liar: bool = False  # sends wrong bytes
    mute: bool = False  # accepts requests, never answers
    confirms: bool = True  # tells others what it has
    queue: UploadQueue = field(default_factory=UploadQueue)
    alive: bool = True
    joined_at: float = 0.0
    done_at: float | None = None
    links: set[str] = field(default_factory=set)
    sending: set[Flow] = field(default_factory=set)
    receiving: set[Flow] = field(default_factory=set)
    asked: dict[int, Flow] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)  # pieces whose sending began
    sent_bytes: float = 0.0
    wrong_received: int = 0
    waits: list[ev.WaitReason] = field(default_factory=list)
    reports: list[ev.ReportPeer] = field(default_factory=list)
    drive_planned: bool = False
    wake_version: int = 0
    token_until: float = float("inf")
    telling_at: float | None = None
    frames: int = 0  # of news

    def __post_init__(self) -> None:
        sim = self.sim
        self.download = Download(
            peer_id=self.name,
            pieces=sim.pieces,
            piece_bytes=sim.piece_bytes,
            size_bytes=sim.size_bytes,
            have=self.have,
            budget_pieces=max(2, sim.memory_bytes // sim.piece_bytes),
            rng=random.Random(f"{sim.seed}/{self.name}"),
        )
        self.choice = SendersChoice(self.name, "m", sim.pieces, self.have)
        self.news = News(sim.pieces, self.have)


class Swarm:
    """The clock, the network and the tracker. `add` peers, then `run`."""

    def __init__(
        self,
        size_bytes: int,
        *,
        seed: int = 0,
        piece_bytes: int | None = None,
        memory_bytes: int = 128 << 20,
        load_seconds: float = 0.0,
        token_seconds: float = 0.0,
    ) -> None:
        """`token_seconds`: how long a token counts; 0: for ever."""
        self.size_bytes = size_bytes
        self.piece_bytes = piece_bytes or piece_bytes_for(size_bytes)
        self.pieces = -(-size_bytes // self.piece_bytes)
        self.seed = seed
        self.memory_bytes = memory_bytes
        self.load_seconds = load_seconds
        self.token_seconds = token_seconds
        self.rng = random.Random(seed)
        self.now = 0.0
        self.peers: dict[str, SimPeer] = {}
        self.tracker_up = True
        self.events = 0
        self.late_bytes = 0.0  # that were sent to a peer after its token had ended
        self.unfinished = 0  # living peers that have not everything
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._sequence = 0
        self._tickets = 0

    # ---- the clock ---------------------------------------------------------------------------------------------

    def at(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (max(when, self.now), self._sequence, act, arguments))

    def run(self, until: Callable[[], bool], limit_seconds: float) -> bool:
        """True when `until` came true; False at the time limit or when nothing will ever happen again."""
        while self._heap:
            if until():
                return True
            if self._heap[0][0] > limit_seconds:
                self.now = limit_seconds
                return until()
            when, _, act, arguments = heapq.heappop(self._heap)
            self.now = when
            self.events += 1
            act(*arguments)
        return until()

    def run_until_done(self, limit_seconds: float) -> bool:
        """Until every living peer has everything."""
        return self.run(self.all_done, limit_seconds)

    def all_done(self) -> bool:
        return not self.unfinished

    # ---- the tracker -------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        up: float,
        down: float = UNLIMITED,
        delay: float = 0.0002,
        have: int = 0,
        **traits: bool,
    ) -> SimPeer:
        peer = SimPeer(self, name, up, down, delay, have, **traits)
        peer.joined_at = self.now
        peer.done_at = self.now if peer.download.done else None
        self.unfinished += peer.done_at is None
        self.peers[name] = peer
        if self.load_seconds:
            self.at(self.now + self.load_seconds, self._declare, peer)
        if self.token_seconds:
            self._renew(peer)
        self._announce(peer)
        self._drive_soon(peer)
        return peer

    def add_seeder(self, name: str, *, up: float, **more: object) -> SimPeer:
        return self.add(name, up=up, have=full_mask(self.pieces), **more)  # type: ignore[arg-type]

    def _announce(self, peer: SimPeer) -> None:
        if not self.tracker_up:
            return
        self._list_for(peer)
        for other in self.peers.values():
            if other is not peer and other.alive and not other.download.done:
                self._feed(other, ev.PeerJoined(peer.name, ("x",), peer.download.done))

    def _list_for(self, peer: SimPeer) -> None:
        for other in self.peers.values():
            if other is not peer and other.alive:
                self._feed(peer, ev.PeerJoined(other.name, ("x",), other.download.done))

    def _renew(self, peer: SimPeer) -> None:
        """A token, renewed at half its life; while no tracker answers, asked for again and again."""
        if not peer.alive:
            return
        if not self.tracker_up:
            self.at(self.now + TOKEN_RETRY_SECONDS * (0.7 + 0.6 * self.rng.random()), self._renew, peer)
            return
        peer.token_until = self.now + self.token_seconds
        self._feed(peer, ev.TokenRenewed())
        self.at(self.now + self.token_seconds / 2, self._renew, peer)
        self.at(peer.token_until, self._token_ends, peer)

    def _token_ends(self, peer: SimPeer) -> None:
        """Unless it was renewed: the peer knows, and whoever sends to it stops."""
        if peer.token_until > self.now or not peer.alive:
            return
        self._feed(peer, ev.TokenExpired())
        for flow in list(peer.receiving):
            self._cancel_at_server(flow)
            self._answer(flow, ev.PieceFailed(flow.request, Failure.GONE))

    def tracker(self, up: bool) -> None:
        self.tracker_up = up
        for peer in self.peers.values():
            if peer.alive:
                self._feed(peer, ev.TrackersBack() if up else ev.TrackersAway())

    def kill(self, peer: SimPeer, *, graceful: bool = False) -> None:
        """The peer is gone; its links break at once for those who hold them (a reset)."""
        self.unfinished -= peer.done_at is None
        peer.alive = False
        for name in list(peer.links):
            other = self.peers[name]
            other.links.discard(peer.name)
            other.choice.unlinked(peer.name)
            other.news.unlinked(peer.name)
            self._feed(other, ev.LinkDown(peer.name, leaving=graceful))
        peer.links.clear()
        for flow in list(peer.sending) + self._queued_at(peer):
            self._break(flow, Failure.GONE)
        for flow in list(peer.asked.values()):
            self._cancel_at_server(flow)
        if self.tracker_up:
            for other in self.peers.values():
                if other.alive:
                    self._feed(other, ev.PeerLeft(peer.name))

    def _queued_at(self, server: SimPeer) -> list[Flow]:
        return [
            flow
            for peer in self.peers.values()
            for flow in peer.asked.values()
            if flow.server is server and flow.state == "queued"
        ]

    # ---- a peer's driver ---------------------------------------------------------------------------------------

    def _feed(self, peer: SimPeer, event: ev.Event) -> None:
        if peer.alive:
            peer.download.feed(event, self.now)
            self._drive_soon(peer)

    def _drive_soon(self, peer: SimPeer) -> None:
        if not peer.drive_planned:
            peer.drive_planned = True
            self.at(self.now, self._drive, peer)

    def _wake(self, peer: SimPeer, version: int) -> None:
        if version == peer.wake_version and peer.alive:
            self._drive(peer)

    def _drive(self, peer: SimPeer) -> None:
        peer.drive_planned = False
        if not peer.alive:
            return
        for action in peer.download.actions(self.now):
            match action:
                case ev.RequestPiece():
                    server = self.peers[action.peer]
                    flow = Flow(peer, server, action.request, action.index)
                    peer.asked[action.request] = flow
                    self.at(self.now + self._one_way(peer, server), self._request_arrives, flow)
                case ev.RequestNext():
                    server = self.peers[action.peer]
                    flow = Flow(peer, server, action.request, -1, action.want)
                    peer.asked[action.request] = flow
                    self.at(self.now + self._one_way(peer, server), self._request_arrives, flow)
                case ev.CancelRequest():
                    flow = peer.asked.pop(action.request, None)  # type: ignore[assignment]
                    if flow is not None:
                        self.at(self.now + self._one_way(peer, flow.server), self._cancel_at_server, flow)
                case ev.PushHave():
                    peer.choice.gained(action.pieces)
                    if peer.confirms:
                        peer.news.gained(action.pieces, self.now)
                        self._tell_in_time(peer)
                case ev.Connect():
                    other = self.peers[action.peer]
                    self.at(self.now + 2 * self._one_way(peer, other), self._connected, peer, other)
                case ev.DropPeer():
                    self._unlink(peer, self.peers[action.peer])
                case ev.ReportPeer():
                    peer.reports.append(action)
                case ev.FindPeers():
                    if self.tracker_up:
                        self._list_for(peer)
                case ev.Waiting():
                    peer.waits.append(action.reason)
                case ev.Done():
                    self.unfinished -= peer.done_at is None
                    peer.done_at = self.now
                case ev.Moving():
                    pass
        peer.wake_version += 1
        wake_at = peer.download.wake_at
        if wake_at is not None:
            assert wake_at >= self.now
            self.at(max(wake_at, self.now + 0.0001), self._wake, peer, peer.wake_version)

    def _one_way(self, one: SimPeer, other: SimPeer) -> float:
        return one.delay + other.delay

    def _connected(self, peer: SimPeer, other: SimPeer) -> None:
        if not peer.alive:
            return
        if not other.alive or other.download.is_banned(peer.name):
            self._feed(peer, ev.LinkDown(other.name, reached=False))
            return
        if other.name in peer.links:
            self._feed(peer, ev.LinkUp(other.name, other.download.have, 2 * self._one_way(peer, other)))
            return
        for one, two in ((peer, other), (other, peer)):
            one.links.add(two.name)
            one.choice.linked(two.name, two.download.have)
            one.news.linked(two.name, two.download.have, one.download.have, self.now)
            self._feed(one, ev.LinkUp(two.name, two.download.have, 2 * self._one_way(one, two)))
        for one, two in ((peer, other), (other, peer)):  # peer exchange
            for known, addresses, complete in two.download.known_peers()[:50]:
                if known != one.name:
                    self._feed(one, ev.PeerJoined(known, addresses, complete))

    def _unlink(self, peer: SimPeer, other: SimPeer) -> None:
        for one, two in ((peer, other), (other, peer)):
            if two.name in one.links:
                one.links.discard(two.name)
                one.choice.unlinked(two.name)
                one.news.unlinked(two.name)
                if one is other:
                    self._feed(one, ev.LinkDown(two.name))

    def _have_arrives(self, sender: SimPeer, peer: SimPeer, pieces: int) -> None:
        if peer.alive and sender.name in peer.links:
            peer.choice.has(sender.name, pieces)
            peer.news.heard(sender.name, pieces, self.now)
            self._tell_in_time(peer)
            self._feed(peer, ev.Have(sender.name, pieces))

    def _tell_in_time(self, peer: SimPeer) -> None:
        wake_at = peer.news.wake_at
        if wake_at is not None and (peer.telling_at is None or wake_at < peer.telling_at):
            peer.telling_at = wake_at
            self.at(wake_at, self._tell, peer, wake_at)

    def _tell(self, peer: SimPeer, planned: float) -> None:
        if planned != peer.telling_at:
            return
        peer.telling_at = None
        for pieces, names in peer.news.due(self.now):
            for name in names:
                other = self.peers[name]
                peer.frames += 1
                self.at(self.now + self._one_way(peer, other), self._have_arrives, peer, other, pieces)
        self._tell_in_time(peer)

    def _declare(self, peer: SimPeer) -> None:
        if not peer.alive:
            return
        declared = peer.queue.declared(self.now)
        load = ev.Load(
            peer.name, declared.bytes_per_second, declared.sending, declared.slots, declared.queued
        )
        for name in peer.links:
            self._feed(self.peers[name], load)
        self.at(self.now + self.load_seconds, self._declare, peer)

    # ---- a piece's way -----------------------------------------------------------------------------------------

    def _answer(self, flow: Flow, event: ev.Event) -> None:
        self.at(self.now + self._one_way(flow.asker, flow.server), self._answered, flow, event)

    def _answered(self, flow: Flow, event: ev.Event) -> None:
        if isinstance(event, ev.PieceFailed | ev.PieceVerified | ev.PieceWrong):
            flow.asker.asked.pop(flow.request, None)
        self._feed(flow.asker, event)

    def _request_arrives(self, flow: Flow) -> None:
        server = flow.server
        if flow.state == "over":
            return
        if not server.alive:
            self._break(flow, Failure.GONE)
            return
        if flow.asker.token_until <= self.now:
            self._break(flow, Failure.REFUSED)
            return
        if flow.index >= 0 and not server.download.have >> flow.index & 1:
            self._break(flow, Failure.NOT_HELD)
            return
        if server.mute:
            return
        self._tickets += 1
        flow.ticket = self._tickets
        self._flows_by_ticket[flow.ticket] = flow
        answer = server.queue.ask(flow.asker.name, flow.ticket, self.now)
        if isinstance(answer, Busy):
            flow.state = "over"
            del self._flows_by_ticket[flow.ticket]
            self._answer(flow, ev.PieceFailed(flow.request, Failure.BUSY, answer.retry_after_seconds))
        elif answer:
            self._begin(flow)

    def _begin(self, flow: Flow) -> None:
        server, asker = flow.server, flow.asker
        if asker.token_until <= self.now:  # it may have waited
            flow.state = "over"
            self._answer(flow, ev.PieceFailed(flow.request, Failure.REFUSED))
            self.at(self.now, self._slot_free, flow)
            return
        if flow.index < 0:
            index = server.choice.choose(asker.name, flow.want, self.now)
            if index is None:
                flow.state = "over"
                self._answer(flow, ev.PieceFailed(flow.request, Failure.NOTHING_TO_CHOOSE))
                self.at(self.now, self._slot_free, flow)  # not at once: hundreds may wait for the same answer
                return
            flow.index = index
        length = min(self.piece_bytes, self.size_bytes - flow.index * self.piece_bytes)
        server.choice.started(
            asker.name, flow.index, self.now, length * (len(server.sending) + 1) / server.up
        )
        server.sent.append(flow.index)
        flow.remaining = length + HEADER_BYTES
        flow.updated_at = self.now
        flow.state = "moving"
        server.sending.add(flow)
        asker.receiving.add(flow)
        self._answer(flow, ev.PieceStarted(flow.request, flow.index))
        self._share(flow)
        if flow.rate and flow.remaining / flow.rate > PROGRESS_SECONDS:
            self.at(self.now + PROGRESS_SECONDS, self._progress, flow)

    def _share(self, changed: Flow) -> None:
        """The flows at both ends of one that came, went or changed get their shares anew."""
        touched = set(changed.server.sending)
        if changed.asker.down < UNLIMITED:
            touched |= changed.asker.receiving
        for flow in touched:
            server, asker = flow.server, flow.asker
            self._move(flow)
            rate = min(server.up / len(server.sending), asker.down / len(asker.receiving))
            if rate != flow.rate or flow is changed:
                flow.rate = rate
                flow.version += 1
                self.at(self.now + flow.remaining / rate, self._sent, flow, flow.version)

    def _move(self, flow: Flow) -> None:
        moved = min(flow.rate * (self.now - flow.updated_at), flow.remaining)
        flow.remaining -= moved
        flow.reported += moved
        flow.server.sent_bytes += moved
        flow.server.queue.moved(int(moved), self.now)
        if self.now > flow.asker.token_until:
            self.late_bytes += moved
        flow.updated_at = self.now

    def _progress(self, flow: Flow) -> None:
        if flow.state != "moving":
            return
        self._move(flow)
        if flow.reported >= 1:
            self._answer(flow, ev.BytesArrived(flow.request, int(flow.reported)))
            flow.reported = 0.0
        self.at(self.now + PROGRESS_SECONDS, self._progress, flow)

    def _sent(self, flow: Flow, version: int) -> None:
        if flow.state != "moving" or version != flow.version:
            return
        self._move(flow)
        flow.server.sent_bytes += flow.remaining
        self._leave(flow)
        self._answer(flow, ev.PieceArrived(flow.request))
        wrong = flow.server.liar
        verdict = ev.PieceWrong(flow.request) if wrong else ev.PieceVerified(flow.request, flow.index)
        flow.asker.wrong_received += wrong
        delay = self._one_way(flow.asker, flow.server) + self.piece_bytes / HASH_BYTES_PER_SECOND
        self.at(self.now + delay, self._answered, flow, verdict)
        self._slot_free(flow)

    def _leave(self, flow: Flow) -> None:
        flow.state = "over"
        flow.server.sending.discard(flow)
        flow.asker.receiving.discard(flow)
        if flow.server.sending or flow.asker.receiving:
            for other in (next(iter(flow.server.sending), None), next(iter(flow.asker.receiving), None)):
                if other is not None:
                    self._share(other)

    def _slot_free(self, flow: Flow) -> None:
        self._flows_by_ticket.pop(flow.ticket, None)
        for ticket in flow.server.queue.finished(flow.ticket, self.now):
            self._begin(self._flows_by_ticket[ticket])

    def _break(self, flow: Flow, failure: Failure) -> None:
        if flow.state == "moving":
            self._move(flow)
            self._leave(flow)
        flow.state = "over"
        self._flows_by_ticket.pop(flow.ticket, None)
        self._answer(flow, ev.PieceFailed(flow.request, failure))

    def _cancel_at_server(self, flow: Flow) -> None:
        if flow.state == "over":
            return
        if flow.state == "moving":
            self._move(flow)
            self._leave(flow)
            flow.server.choice.failed(flow.asker.name, flow.index)
        flow.state = "over"
        if flow.ticket:
            self._slot_free(flow)

    @property
    def _flows_by_ticket(self) -> dict[int, Flow]:
        return self.__dict__.setdefault("_tickets_open", {})  # type: ignore[no-any-return]

    # ---- what tests ask ----------------------------------------------------------------------------------------

    def finish_seconds(self) -> float:
        """When the last of the living was done."""
        return max(peer.done_at or 0.0 for peer in self.peers.values() if peer.alive)

    def bound_seconds(self) -> float:
        """The fluid bound (Kumar and Ross) for the present peers, all starting at once."""
        seeders = [peer for peer in self.peers.values() if peer.have == full_mask(self.pieces)]
        leechers = [peer for peer in self.peers.values() if peer not in seeders]
        seeding = sum(peer.up for peer in seeders)
        everyone = seeding + sum(peer.up for peer in leechers)
        return max(
            self.size_bytes / seeding,
            self.size_bytes / min(peer.down for peer in leechers),
            len(leechers) * self.size_bytes / everyone,
        )

    def missing(self, peer: SimPeer) -> int:
        return without(full_mask(self.pieces), peer.download.have).bit_count()
