"""What the trackers' agreement costs, side by side with etcd on the same machine in the same run.

    python -m benchmarks.consensus [--rounds 3] [--seconds 5] [--clients 1,16,64,256] [--trials 20]

Three nodes each as processes, synced to disk, plain HTTP on both, the same compiled load generator (`wrk`)
against the leader of each in turn. etcd's writes are `put`s through its HTTP gateway; ours are a new version
of a shared file: session checked, rights checked, request id remembered. Reported: acknowledged writes a
second, p50 and p99, CPU seconds of all three nodes per 1,000 writes, peak memory; announce calls a second,
and peers kept alive by heartbeats; the time without a successful write after `kill -9` of the leader; and a
rolling restart under load. What a million facts cost is `benchmarks/million.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import results, rolling, wrk
from benchmarks.announcing import Announcers
from benchmarks.clusters import Cluster, Etcd, Trimaran
from benchmarks.processes import wait_until

ANNOUNCE_SECONDS = 10.0  # how often a peer sends its heartbeat
ANNOUNCING_CLIENTS = (64, 256)

Samples = dict[str, list[dict[str, float]]]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then, too
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consensus", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--trials", type=int, default=20, help="kills of the leader")
    parser.add_argument("--only", choices=["trimaran", "etcd"])
    parser.add_argument("--writes-only", action="store_true", help="no announce calls, no rolling restart")
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        print("benchmarks.consensus needs the load generator wrk (Debian: wrk)", file=sys.stderr)
        return 2
    kinds: list[type[Cluster]] = [Trimaran, Etcd]
    if options.only:
        kinds = [kind for kind in kinds if kind.name == options.only]
    for kind in list(kinds):
        if reason := kind.missing():
            print(f"{kind.name}: skipped: {reason}", file=sys.stderr)
            kinds.remove(kind)
    rows: list[dict[str, Any]] = []

    def keep(**row: Any) -> None:
        rows.append(row)
        print(row, flush=True)

    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="trimaran-bench-") as folder:
        clusters = [kind(Path(folder) / kind.name) for kind in kinds]
        try:
            for cluster in clusters:
                cluster.folder.mkdir()
                cluster.start()
            for clients in map(int, options.clients.split(",")):
                compare_writes(clusters, clients, options.rounds, options.seconds, keep)
            for cluster in clusters:
                if isinstance(cluster, Trimaran) and not options.writes_only:
                    announce(cluster, options.rounds, options.seconds, keep)
            if options.trials:
                kill_leaders(clusters, options.trials, keep)
            for cluster in clusters:
                if isinstance(cluster, Trimaran) and not options.writes_only:
                    keep(cluster=cluster.name, **rolling.measure(cluster))
        finally:
            for cluster in clusters:
                cluster.stop()
    note = f"load average before {before:.1f}, after {os.getloadavg()[0]:.1f}, which includes this benchmark"
    if options.no_keep:
        print(results.table(rows))
    else:
        results.keep("consensus", rows, note)
    return 0


def compare_writes(
    clusters: list[Cluster], clients: int, rounds: int, seconds: int, keep: Callable[..., None]
) -> None:
    """Alternating, so that whatever else the machine does falls on all of them."""
    samples: Samples = {cluster.name: [] for cluster in clusters}
    loads: list[float] = []
    for _ in range(rounds):
        loads.append(os.getloadavg()[0])
        for cluster in clusters:
            samples[cluster.name].append(write_load(cluster, clients, seconds))
    for cluster in clusters:
        keep(
            cluster=cluster.name, clients=clients, **medians(samples[cluster.name]),
            peak_mib=round(cluster.peak_bytes() / 2**20), load_average=round(statistics.median(loads), 1),
        )  # fmt: skip


def write_load(cluster: Cluster, clients: int, seconds: int) -> dict[str, float]:
    """One run of `wrk` against the leader. Each acknowledged write must have been one of its own."""
    before = cluster.revision()
    said, cpu = _measured(cluster, cluster.load_script(), clients, seconds)
    changed = cluster.revision() - before
    assert changed >= said["acknowledged"], f"{said['acknowledged']} acknowledged, {changed} changes"
    return {
        "writes_per_second": said["per_second"],
        "p50_ms": said["p50_ms"],
        "p99_ms": said["p99_ms"],
        "cpu_seconds_per_1000": cpu / max(said["acknowledged"], 1) * 1000,
    }


def announce(cluster: Trimaran, rounds: int, seconds: int, keep: Callable[..., None]) -> None:
    """Announce calls, in turn with writes of as many clients; then heartbeats."""
    announcers = Announcers(cluster)
    for clients in ANNOUNCING_CLIENTS:
        calls: list[dict[str, float]] = []
        for _ in range(rounds):
            writes = write_load(cluster, clients, seconds)["writes_per_second"]
            announcers.say_all()
            before = announcers.logged()
            said, cpu = _measured(cluster, announcers.script(changes=True), clients, seconds)
            changed = announcers.logged() - before
            assert changed >= said["acknowledged"], (
                f"each call must have changed something: {changed}, {said}"
            )
            calls.append(
                {
                    "announce_calls_per_second": said["per_second"],
                    "times_writes": said["per_second"] / writes,
                    "p50_ms": said["p50_ms"],
                    "p99_ms": said["p99_ms"],
                    "cpu_seconds_per_1000": cpu / max(said["acknowledged"], 1) * 1000,
                }
            )
        keep(cluster=cluster.name, clients=clients, **medians(calls))
    beats: list[dict[str, float]] = []
    for _ in range(rounds):
        announcers.say_all()
        before = announcers.logged()
        said, cpu = _measured(cluster, announcers.script(changes=False), ANNOUNCING_CLIENTS[0], seconds)
        assert announcers.logged() - before < said["acknowledged"] / 100, "heartbeats change nothing"
        per_cpu_second = said["acknowledged"] / cpu
        beats.append(
            {
                "heartbeats_per_second": said["per_second"],
                "heartbeats_per_cpu_second": per_cpu_second,
                "peers_kept_alive_per_cpu_second": per_cpu_second * ANNOUNCE_SECONDS,
            }
        )
    keep(cluster=cluster.name, clients=ANNOUNCING_CLIENTS[0], **medians(beats))


def _measured(cluster: Cluster, script: str, clients: int, seconds: int) -> tuple[dict[str, float], float]:
    """What `wrk` says, and the CPU seconds of all nodes meanwhile."""
    leader = cluster.until_led()
    before = cluster.cpu_seconds()
    said = wrk.run(cluster.urls[leader], script, cluster.folder, clients, seconds, cluster.name)
    return said, cluster.cpu_seconds() - before


def kill_leaders(clusters: list[Cluster], trials: int, keep: Callable[..., None]) -> None:
    gaps: dict[str, list[float]] = {cluster.name: [] for cluster in clusters}
    for trial in range(trials):
        for cluster in clusters:
            gaps[cluster.name].append(kill_leader(cluster, trial))
    for cluster in clusters:
        seconds = gaps[cluster.name]
        keep(
            cluster=cluster.name, trials=trials, no_write_seconds_median=round(statistics.median(seconds), 3),
            no_write_seconds_max=round(max(seconds), 3),
        )  # fmt: skip


def kill_leader(cluster: Cluster, trial: int) -> float:
    """Kill the leader, and write through the others until one is acknowledged; seconds that took."""
    leader = cluster.until_led()
    others = [number for number in range(3) if number != leader]
    assert cluster.write_once(others[0], trial * 1000, 10), "a write before the kill"
    begun = time.monotonic()
    cluster.nodes[leader].kill()
    attempt = 0
    while True:
        attempt += 1
        if cluster.write_once(others[attempt % 2], trial * 1000 + attempt, 0.5):
            break
        if time.monotonic() - begun > 30:
            raise TimeoutError(f"{cluster.name}: no write within 30 s of a kill")
        time.sleep(0.01)
    gap = time.monotonic() - begun
    cluster.restart(leader)
    wait_until(
        lambda: cluster.write_once(leader, 10**6 + trial, 1), 30, f"{cluster.name} node {leader} is back"
    )
    return gap


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(sample[name] for sample in samples), 3) for name in samples[0]}


if __name__ == "__main__":
    raise SystemExit(main())
