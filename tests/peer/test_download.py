"""The download machine under any order of events, and its rules one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer import swarm_events as ev
from peer.bitmap import full_mask, indices_of
from peer.download import Download
from peer.swarm_events import Failure, Fault, WaitReason

PIECE = 1 << 18
PEERS = ["a", "b", "c", "d"]


def machine(pieces: int = 16, have: int = 0, budget: int = 32) -> Download:
    return Download(
        peer_id="me",
        pieces=pieces,
        piece_bytes=PIECE,
        size_bytes=pieces * PIECE - 7 if pieces else 0,
        have=have,
        budget_pieces=budget,
        rng=random.Random(7),
    )


def of(kind: type, actions: list[ev.Action]) -> list:
    return [action for action in actions if isinstance(action, kind)]


def bring(download: Download, request: int, index: int, now: float) -> None:
    download.feed(ev.PieceStarted(request, index), now)
    download.feed(ev.PieceArrived(request), now)
    download.feed(ev.PieceVerified(request, index), now)


def check_books(download: Download, open_requests: dict[int, ev.Action]) -> None:
    """What is free, asked for and here, counted anew from the machine's own requests."""
    picker = download.picker
    asked = 0
    for request in download._requests:
        assert request.number in open_requests
        if request.index >= 0:
            asked |= 1 << request.index
    assert download.in_flight == len(open_requests)
    assert picker.have & picker.free == 0
    assert picker.free & asked == 0
    assert picker.have | picker.free | asked == full_mask(picker.pieces), "a piece was lost"
    assert picker.missing == picker.pieces - picker.have.bit_count()
    assert picker.free_count == picker.free.bit_count()
    for source in download.roster.sources.values():
        assert source.in_flight == sum(1 for r in source.requests.values() if r.stage.value != "checking")
        assert source.in_flight_bytes >= 0
    linked = [source for source in download.roster.sources.values() if source.linked]
    for index in range(picker.pieces):
        assert picker.copies(index) == sum(source.have >> index & 1 for source in linked)
    assert download.roster.linked == len(linked)


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.integers(0, 24),
    budget=st.integers(1, 8),
    steps=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 1 << 24), st.integers(0, 300)), max_size=80),
)
def test_any_order_of_events_loses_no_piece_counts_none_twice_and_ends(
    pieces: int, budget: int, steps: list[tuple[int, int, int]]
) -> None:
    download = machine(pieces, budget=budget)
    everything = full_mask(pieces)
    open_requests: dict[int, ev.Action] = {}
    closed: list[int] = [99]
    banned: set[str] = set()
    now = 0.0
    done = pieces == 0

    def act() -> None:
        nonlocal done
        for action in download.actions(now):
            match action:
                case ev.RequestPiece():
                    assert not download.have >> action.index & 1
                    assert action.length_bytes == (PIECE if action.index < pieces - 1 else PIECE - 7)
                    assert action.peer not in banned
                    open_requests[action.request] = action
                case ev.RequestNext():
                    assert action.want and not action.want & download.have
                    assert action.peer not in banned
                    open_requests[action.request] = action
                case ev.CancelRequest():
                    closed.append(action.request)
                    del open_requests[action.request]
                case ev.DropPeer():
                    if action.banned:
                        banned.add(action.peer)
                case ev.Done():
                    done = True
        assert download.wake_at is None or download.wake_at >= now
        check_books(download, open_requests)

    for what, value, tenths in steps:
        now += tenths / 100
        peer = PEERS[value % len(PEERS)]
        mask = (value * 2654435761 ^ value >> 3) & everything
        number = list(open_requests)[value % len(open_requests)] if open_requests else closed[-1]
        request = open_requests.get(number)
        if isinstance(request, ev.RequestPiece):
            index = request.index
        else:
            wanted = indices_of(request.want) if isinstance(request, ev.RequestNext) else list(range(pieces))
            index = wanted[value % len(wanted)] if wanted else 0
        known = download._requests.get(number)
        if known is not None and known.index >= 0:
            index = known.index
        match what:
            case 0 | 1:
                download.feed(ev.LinkUp(peer, everything if value & 64 else mask, 0.01), now)
            case 2:
                download.feed(ev.LinkDown(peer, bool(value & 64), bool(value & 128)), now)
            case 3:
                download.feed(ev.Have(peer, mask), now)
            case 4:
                download.feed(ev.PeerJoined(peer, ("x",), bool(value & 64)), now)
            case 5:
                download.feed(ev.PeerLeft(peer), now)
            case 6 | 7 | 8 | 9 | 10 if pieces and (known is None or known.index >= 0 or request):
                if known is not None and known.index < 0:
                    download.feed(ev.PieceStarted(number, index), now)
                if known is None or download._requests.get(number) is not None:
                    open_requests.pop(number, None)
                    closed.append(number)
                    download.feed(ev.PieceVerified(number, index), now)
                else:
                    open_requests.pop(number, None)
                    for action in of(ev.CancelRequest, download._out):
                        open_requests.setdefault(action.request, action)
            case 11:
                open_requests.pop(number, None)
                closed.append(number)
                failure = list(Failure)[value % len(Failure)]
                download.feed(ev.PieceFailed(number, failure, (value % 50) / 10), now)
                for action in of(ev.CancelRequest, download._out):
                    open_requests.setdefault(action.request, action)
            case 12:
                download.feed(ev.PieceWrong(number), now)
            case 13 if known is not None and known.index >= 0:
                download.feed(ev.PieceArrived(number), now)
            case 14:
                download.feed(ev.BytesArrived(number, value % (2 * PIECE)), now)
            case 15:
                download.feed(ev.PieceStarted(number, index), now)
            case 16:
                download.feed(ev.PiecesFound(mask & mask >> 3), now)
            case 17:
                download.feed(ev.Load(peer, value % 10_000_000, value % 9, 4, value % 3), now)
            case 18:
                download.feed(ev.Budget(1 + value % 9, float(value % 3) * 100_000), now)
            case 19:
                download.feed(ev.Pause() if value & 1 else ev.Resume(), now)
            case 20:
                download.feed(ev.TokenExpired() if value & 1 else ev.TokenRenewed(), now)
            case 21:
                download.feed(ev.TrackersAway() if value & 1 else ev.TrackersBack(), now)
            case 22:
                lost = mask & mask >> 5
                if lost & download.have:
                    done = False
                download.feed(ev.PiecesLost(lost), now)
            case 23 if pieces:
                download.feed(ev.PieceStarted(number, value % pieces), now)
            case _:
                pass
        act()

    # From any state, one honest seeder and time finish it.
    download.feed(ev.Resume(), now)
    download.feed(ev.TokenRenewed(), now)
    download.feed(ev.LinkUp("honest", everything), now)
    for _ in range(40 * (pieces + 4)):
        act()
        if download.done:
            break
        for number, action in list(open_requests.items()):
            known = download._requests.get(number)
            if known is not None and known.stage.value == "checking" and known.index >= 0:
                del open_requests[number]
                download.feed(ev.PieceVerified(number, known.index), now)  # a check always ends
                act()
                continue
            if action.peer != "honest" or number not in open_requests:
                continue
            index = action.index if isinstance(action, ev.RequestPiece) else indices_of(action.want)[0]
            download.feed(ev.PieceStarted(number, index), now)
            if download._requests.get(number) is not None:
                del open_requests[number]
                download.feed(ev.PieceVerified(number, index), now)
            act()
        now = max(now + 0.5, download.wake_at or 0.0)
    act()
    assert download.done and done
    assert download.have == everything
    assert not download.roster.is_banned("honest")


def test_a_newcomer_is_probed_with_one_piece_and_then_trusted_with_more() -> None:
    download = machine()
    download.feed(ev.LinkUp("a", full_mask(16)), 0.0)
    asked = of(ev.RequestPiece, download.actions(0.0))
    assert len(asked) == 1
    download.feed(ev.PieceStarted(asked[0].request, asked[0].index), 0.001)
    bring(download, asked[0].request, asked[0].index, 0.1)
    assert len(of(ev.RequestPiece, download.actions(0.1))) == 2


def test_the_rarest_piece_first() -> None:
    download = machine(8)
    download.feed(ev.LinkUp("a", 0b11111111), 0.0)
    download.feed(ev.LinkUp("b", 0b11110111), 0.0)
    download.feed(ev.LinkUp("c", 0b11110111), 0.0)
    asked = {action.peer: action for action in download.actions(0.0)}
    assert isinstance(asked["a"], ev.RequestNext) or asked["a"].index == 3


def test_a_seeder_chooses_only_while_others_download() -> None:
    alone = machine()
    alone.feed(ev.LinkUp("a", full_mask(16)), 0.0)
    assert of(ev.RequestPiece, alone.actions(0.0))
    crowded = machine()
    crowded.feed(ev.PeerJoined("b", ("x",), False), 0.0)
    crowded.feed(ev.LinkUp("a", full_mask(16)), 0.0)
    (ask,) = of(ev.RequestNext, crowded.actions(0.0))
    crowded.feed(ev.PieceFailed(ask.request, Failure.NOTHING_TO_CHOOSE), 0.1)
    assert of(ev.RequestPiece, crowded.actions(0.1)), "after 204 it asks by index"


def test_two_choosing_seeders_are_asked_for_different_pieces() -> None:
    download = machine(64)
    download.feed(ev.PeerJoined("c", ("x",), False), 0.0)
    for seeder in ("a", "b"):
        download.feed(ev.LinkUp(seeder, full_mask(64)), 0.0)
    one, two = of(ev.RequestNext, download.actions(0.0))
    assert one.want & two.want == 0
    assert one.want | two.want == full_mask(64)


def test_a_wrong_piece_bans_its_sender_and_goes_to_another() -> None:
    download = machine(1)
    download.feed(ev.LinkUp("a", 1), 0.0)
    (asked,) = of(ev.RequestPiece, download.actions(0.0))
    download.feed(ev.LinkUp("b", 1), 0.1)
    download.feed(ev.PieceArrived(asked.request), 0.1)
    download.feed(ev.PieceWrong(asked.request), 0.1)
    actions = download.actions(0.1)
    assert [(drop.peer, drop.banned) for drop in of(ev.DropPeer, actions)] == [("a", True)]
    assert of(ev.ReportPeer, actions) == [ev.ReportPeer("a", Fault.BAD_PIECE)]
    assert [request.peer for request in of(ev.RequestPiece, actions)] == ["b"]
    download.feed(ev.LinkUp("a", 1), 0.2)
    assert [drop.peer for drop in of(ev.DropPeer, download.actions(0.2))] == ["a"]


def test_busy_means_later_and_only_there() -> None:
    download = machine(1)
    download.feed(ev.LinkUp("a", 1), 0.0)
    (asked,) = of(ev.RequestPiece, download.actions(0.0))
    download.feed(ev.PieceFailed(asked.request, Failure.BUSY, 2.0), 0.0)
    actions = download.actions(0.0)
    assert not of(ev.RequestPiece, actions)
    assert of(ev.Waiting, actions) == [ev.Waiting(WaitReason.BUSY)]
    download.feed(ev.LinkUp("b", 1), 0.5)
    actions = download.actions(0.5)
    assert [request.peer for request in of(ev.RequestPiece, actions)] == ["b"]
    assert of(ev.Moving, actions)


def test_a_busy_peer_is_asked_again_by_itself() -> None:
    download = machine(1)
    download.feed(ev.LinkUp("a", 1), 0.0)
    (asked,) = of(ev.RequestPiece, download.actions(0.0))
    download.feed(ev.PieceFailed(asked.request, Failure.BUSY, 2.0), 0.0)
    now = 0.0
    for _ in range(20):
        if requests := of(ev.RequestPiece, download.actions(now)):
            break
        assert download.wake_at is not None
        now = download.wake_at
    assert requests and 2.0 <= now <= 2.6


def test_a_stalled_piece_goes_elsewhere_and_the_stalling_peer_is_left_alone() -> None:
    download = machine(2)
    download.feed(ev.LinkUp("a", 0b01), 0.0)
    (first,) = of(ev.RequestPiece, download.actions(0.0))
    download.feed(ev.PieceStarted(first.request, 0), 0.1)
    download.feed(ev.BytesArrived(first.request, 1000), 0.2)
    download.feed(ev.LinkUp("b", 0b00), 0.2)
    now, cancelled = 0.2, []
    while not cancelled and now < 30:
        now = max(now + 0.1, min(download.wake_at or now, now + 1))
        actions = download.actions(now)
        cancelled = of(ev.CancelRequest, actions)
    assert 3 <= now < 30
    download.feed(ev.Have("b", 0b01), now)
    assert [request.peer for request in of(ev.RequestPiece, download.actions(now))] == ["b"]


def test_the_last_piece_is_asked_of_several_and_the_first_copy_wins() -> None:
    download = machine(3)
    download.feed(ev.LinkUp("slow", 0b111), 0.0)
    (probe,) = of(ev.RequestPiece, download.actions(0.0))
    bring(download, probe.request, probe.index, 10.0)  # 26 KB/s
    held = of(ev.RequestPiece, download.actions(10.0))
    assert len(held) == 2
    download.feed(ev.LinkUp("fast", 0b111), 10.1)
    download.feed(ev.Load("fast", 50e6, 1, 4), 10.1)
    (help_asked,) = of(ev.RequestPiece, download.actions(10.1))
    assert help_asked.peer == "fast"
    bring(download, help_asked.request, help_asked.index, 10.15)
    actions = download.actions(10.15)
    loser = next(request.request for request in held if request.index == help_asked.index)
    assert ev.CancelRequest(loser) in actions
    download.feed(ev.PieceVerified(loser, help_asked.index), 10.2)  # too late, and harmless
    assert download.picker.missing == 1


def test_waiting_says_why_and_ends_by_itself() -> None:
    download = machine(1)
    assert ev.Waiting(WaitReason.NO_PEERS) in download.actions(0.0)
    download.feed(ev.TrackersAway(), 1.0)
    assert ev.Waiting(WaitReason.NO_PEERS_NO_TRACKER) in download.actions(1.0)
    download.feed(ev.LinkUp("a", 0), 2.0)
    assert ev.Waiting(WaitReason.PIECES_MISSING) in download.actions(2.0)
    download.feed(ev.TokenExpired(), 3.0)
    download.feed(ev.Have("a", 1), 3.0)
    assert download.actions(3.0) == [ev.Waiting(WaitReason.TOKEN_EXPIRED)]
    download.feed(ev.TokenRenewed(), 4.0)
    actions = download.actions(4.0)
    assert of(ev.RequestPiece, actions) and of(ev.Moving, actions)
    download.feed(ev.Pause(), 5.0)
    assert download.waiting is None
    actions = download.actions(5.0)
    assert of(ev.CancelRequest, actions) and ev.Waiting(WaitReason.PAUSED) in actions


def test_unreachable_peers_are_tried_ever_less_often_and_reported_once() -> None:
    download = machine(1)
    download.feed(ev.PeerJoined("a", ("x",)), 0.0)
    now, tries, reports = 0.0, [], []
    while now < 300:
        for action in download.actions(now):
            if isinstance(action, ev.Connect):
                tries.append(now)
                download.feed(ev.LinkDown("a", reached=False), now)
            elif isinstance(action, ev.ReportPeer):
                reports.append(action)
        assert download.wake_at is not None
        now = max(download.wake_at, now + 0.01)
    assert 8 <= len(tries) <= 40
    assert tries[-1] - tries[-2] > 10
    assert reports == [ev.ReportPeer("a", Fault.UNREACHABLE)]


def test_a_scarce_budget_is_not_kept_by_the_slow() -> None:
    download = machine(64, budget=4)
    for peer in PEERS:
        download.feed(ev.LinkUp(peer, full_mask(64)), 0.0)
    assert len(of(ev.RequestPiece, download.actions(0.0))) == 4
    assert download.in_flight == 4


@pytest.mark.parametrize("failure", [Failure.REFUSED, Failure.NOT_HELD, Failure.GONE, Failure.GARBLED])
def test_every_failure_frees_the_piece_for_another(failure: Failure) -> None:
    download = machine(1)
    download.feed(ev.LinkUp("a", 1), 0.0)
    (asked,) = of(ev.RequestPiece, download.actions(0.0))
    download.feed(ev.LinkUp("b", 1), 0.0)
    download.feed(ev.PieceFailed(asked.request, failure), 0.1)
    actions = download.actions(0.1)
    assert [a.peer for a in actions if isinstance(a, ev.RequestPiece | ev.RequestNext)] == ["b"]
