"""What the deciding costs: microseconds per choice and per event, without any I/O.

    python -m benchmarks.picker

One row per number of pieces. `choose` is the sender's choice with 300 askers known; `pick` the downloader's rarest-first pick with 50
linked peers; `have` a peer's news of one piece; `piece` everything the download machine does for one piece, from the request to
the news of it, with 8 linked peers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from peer import swarm_events as ev
from peer.bitmap import full_mask
from peer.download import Download
from peer.picker import Picker
from peer.sender import SendersChoice

PIECE_BYTES = 4 << 20


def microseconds(act: Callable[[], object], times: int) -> float:
    """The best of three runs, per call."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(times):
            act()
        best = min(best, time.perf_counter() - began)
    return best / times * 1e6


def choose(pieces: int, rng: random.Random) -> float:
    choice = SendersChoice("seeder", "manifest", pieces, full_mask(pieces))
    for number in range(300):
        choice.linked(
            f"p{number}", rng.getrandbits(pieces) & rng.getrandbits(pieces) & rng.getrandbits(pieces // 2)
        )
    want = rng.getrandbits(pieces)
    return microseconds(lambda: choice.choose("p7", want, 0.0), 300)


def pick(pieces: int, rng: random.Random) -> tuple[float, float]:
    picker = Picker(pieces, 0, rng)
    for _ in range(50):
        picker.peer_has(rng.getrandbits(pieces))
    among = rng.getrandbits(pieces)
    bits = [1 << rng.randrange(pieces) for _ in range(300)]

    def news() -> None:
        for bit in bits:
            picker.peer_has(bit)

    return microseconds(lambda: picker.pick(among), 300), microseconds(news, 3) / len(bits)


def piece(pieces: int) -> float:
    download = Download(
        peer_id="me",
        pieces=pieces,
        piece_bytes=PIECE_BYTES,
        size_bytes=pieces * PIECE_BYTES,
        rng=random.Random(1),
    )
    for number in range(8):
        download.feed(ev.LinkUp(f"p{number}", full_mask(pieces), 0.0005), 0.0)
    queue: list[ev.RequestPiece] = []
    now = 0.0
    done = 0
    began = time.perf_counter()
    while done < min(pieces, 4000):
        queue += [action for action in download.actions(now) if isinstance(action, ev.RequestPiece)]
        request = queue.pop(0)
        now += 0.003
        download.feed(ev.PieceStarted(request.request, request.index), now)
        download.feed(ev.PieceArrived(request.request), now)
        download.feed(ev.PieceVerified(request.request, request.index), now)
        done += 1
    return (time.perf_counter() - began) / done * 1e6


def main() -> None:
    print(f"{'pieces':>8} {'choose µs':>10} {'pick µs':>10} {'have µs':>10} {'piece µs':>10}")
    for pieces in (512, 4096, 16_384, 131_072):
        rng = random.Random(pieces)
        picked, heard = pick(pieces, rng)
        print(
            f"{pieces:>8} {choose(pieces, rng):>10.1f} {picked:>10.1f} {heard:>10.1f} {piece(pieces):>10.1f}"
        )


if __name__ == "__main__":
    main()
