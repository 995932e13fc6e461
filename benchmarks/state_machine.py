"""The state machine alone: time per command, and what a million facts cost.

    python -m benchmarks.state_machine [--facts 1000000] [--json | --keep]

Facts are users, memberships, files and seeders, a quarter of each. Times of commands are from bytes to
outcome: decoding, request id, rules, derived counts, events; they are CPU time, pauses are wall time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator

from benchmarks.results import keep
from state_machine import codec
from state_machine import commands as c
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied

HASH = hashlib.sha256(b"request").digest()
PASSWORD_HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$" + "x" * 43
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def request_id(number: int) -> str:
    moment = 1_700_000_000_000 + number // 5
    text = f"{moment:012x}7{number % 4096:03x}8{number:015x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def peer_id(number: int) -> str:
    return "".join(ALPHABET[number >> shift & 31] for shift in range(0, 25, 5)).ljust(52, "a")


def manifest_id(number: int) -> str:
    return f"{number:064x}"


def rss_mb() -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def facts(count: int) -> Iterator[bytes]:
    """Entries that bring about `count` facts: a quarter each of users, memberships, files, seeders."""
    quarter = count // 4
    groups = max(1, quarter // 50)
    at_ms = 1_700_000_000_000
    number = 0

    def entry(command: c.AnyCommand, caller: str) -> bytes:
        nonlocal number
        number += 1
        return codec.encode(command, caller=caller, request_id=request_id(number), request_hash=HASH)

    for n in range(quarter):
        user = f"user-{n:07d}"
        yield entry(c.RegisterUser(user, PASSWORD_HASH, at_ms), user)
        yield codec.encode(c.PutPeer(peer_id(n), user, at_ms))
    for n in range(quarter):
        user, group, owner = f"user-{n:07d}", f"group-{n % groups:06d}", f"user-{n % groups:07d}"
        if n < groups:
            yield entry(c.CreateGroup(group, user, at_ms), user)
        else:
            yield entry(c.RequestJoin(group, user, at_ms), user)
            yield entry(c.AcceptRequest(group, user, owner, at_ms), owner)
    for n in range(quarter):
        user, group = f"user-{n:07d}", f"group-{n % groups:06d}"
        yield entry(
            c.PublishFile(
                group, f"file {n}.bin", "file", 1 << 24, 8, 1 << 21, "sha256",
                manifest_id(n), False, user, at_ms, at_ms,
            ),
            user,
        )  # fmt: skip
    batch: list[c.Announcement] = []
    for n in range(quarter):
        group, name = f"group-{n % groups:06d}", f"file {n}.bin"
        fact = c.Fact(group, name, manifest_id(n), 8, True)
        batch.append(c.Announcement(peer_id(n), f"user-{n:07d}", ("https://10.0.0.1:7400",), (fact,), True))
        if len(batch) == 50 or n == quarter - 1:
            yield codec.encode(c.AnnouncePeers(tuple(batch), at_ms))
            batch = []


def measure_load(count: int) -> tuple[StateMachine, dict[str, float]]:
    gc.collect()
    before_mb = rss_mb()
    machine = StateMachine(on_change=lambda change: None)
    spent: dict[str, list[float]] = {}
    for data in facts(count):
        kind = type(codec.decode(data).command).__name__  # type: ignore[union-attr]
        begin = time.thread_time()
        [outcome] = machine.apply([data])
        spent.setdefault(kind, []).append(time.thread_time() - begin)
        assert isinstance(outcome, Applied), outcome
    report = {}
    for kind, seconds in spent.items():
        per = 50 if kind == "AnnouncePeers" else 1
        report[f"{kind} us"] = round(statistics.mean(seconds) / per * 1e6, 2)
    gc.collect()
    report["memory MB"] = round(rss_mb() - before_mb)
    return machine, report


def measure_announce(machine: StateMachine, count: int) -> dict[str, float]:
    """One changed fact by each of many peers, gathered by 50; and renewals of all peers."""
    quarter = count // 4
    groups = max(1, quarter // 50)
    peers = min(quarter, 50_000)
    entries = []
    for start in range(0, peers, 50):
        announcements = []
        for n in range(start, min(peers, start + 50)):
            fact = c.Fact(f"group-{n % groups:06d}", f"file {n}.bin", manifest_id(n), 3, False)
            announcements.append(c.Announcement(peer_id(n), f"user-{n:07d}", (), (fact,)))
        entries.append(codec.encode(c.AnnouncePeers(tuple(announcements), 1)))
    begin = time.thread_time()
    machine.apply(entries)
    announced = time.thread_time() - begin
    renewal = codec.encode(c.RenewPeers(tuple(peer_id(n) for n in range(min(quarter, 10_000)))))
    begin = time.thread_time()
    machine.apply([renewal])
    renewed = time.thread_time() - begin
    return {
        "announcement us": round(announced / peers * 1e6, 2),
        "renewal of one peer us": round(renewed / min(quarter, 10_000) * 1e6, 2),
    }


def measure_snapshot(machine: StateMachine, count: int) -> tuple[list[bytes], dict[str, float]]:
    begin = time.perf_counter()
    frozen = machine.freeze()
    freeze_ms = (time.perf_counter() - begin) * 1e3
    pieces: list[bytes] = []
    longest = total = 0.0
    slices = frozen.slices()
    while True:
        begin = time.perf_counter()
        piece = next(slices, None)
        spent = time.perf_counter() - begin
        longest, total = max(longest, spent), total + spent
        if piece is None:
            break
        pieces.append(piece)
    worst = 0.0
    machine.freeze()
    for n in range(min(count // 4, 5_000)):
        data = codec.encode(c.ChangePassword(f"user-{n:07d}", PASSWORD_HASH, 1))
        begin = time.perf_counter()
        machine.apply([data])
        worst = max(worst, time.perf_counter() - begin)
    return pieces, {
        "freeze ms": round(freeze_ms, 3),
        "longest slice ms": round(longest * 1e3, 2),
        "encode s": round(total, 2),
        "snapshot MB": round(sum(map(len, pieces)) / 1e6),
        "slowest write right after a freeze ms": round(worst * 1e3, 2),
    }


def measure_install(pieces: list[bytes]) -> tuple[StateMachine, dict[str, float]]:
    machine = StateMachine()
    gc.collect()
    before_mb = rss_mb()
    loader = machine.loader()
    longest = total = 0.0
    for piece in pieces:
        loader.feed(piece)
        more = True
        while more:
            begin = time.perf_counter()
            more = loader.work()
            spent = time.perf_counter() - begin
            longest, total = max(longest, spent), total + spent
    begin = time.perf_counter()
    loader.finish()
    finish = time.perf_counter() - begin
    del loader
    gc.collect()
    loaded_mb = rss_mb() - before_mb
    begin = time.perf_counter()
    gc.collect()
    collect_ms = (time.perf_counter() - begin) * 1e3
    gc.freeze()
    begin = time.perf_counter()
    gc.collect()
    frozen_ms = (time.perf_counter() - begin) * 1e3
    gc.unfreeze()
    return machine, {
        "load s": round(total, 2),
        "longest load step ms": round(longest * 1e3, 2),
        "swap ms": round(finish * 1e3, 2),
        "memory after load MB": round(loaded_mb),
        "full collection ms": round(collect_ms, 1),
        "full collection after gc.freeze ms": round(frozen_ms, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the result under benchmarks/results/")
    options = parser.parse_args()
    machine, report = measure_load(options.facts)
    report |= measure_announce(machine, options.facts)
    digest = machine.digest()
    pieces, snapshot = measure_snapshot(machine, options.facts)
    report |= snapshot
    del machine
    loaded, install = measure_install(pieces)
    report |= install
    assert loaded.digest() == digest, "a snapshot must be the state it was taken of"
    report["peak MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if options.keep:
        rows = [{"what": name, "value": value} for name, value in report.items()]
        keep(
            "state-machine",
            rows,
            f"{options.facts} facts; load average {os.getloadavg()[0]:.1f} on a shared machine",
        )
    elif options.json:
        print(json.dumps({"facts": options.facts, **report}))
    else:
        print(f"{options.facts} facts")
        for name, value in report.items():
            print(f"  {name:40} {value}")


if __name__ == "__main__":
    main()
