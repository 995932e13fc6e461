"""What the trackers' agreement costs, side by side with etcd on the same machine in the same run.

    python -m benchmarks.consensus [--rounds 3] [--seconds 5] [--clients 1,16,64,256] [--trials 20]

Three nodes each as processes, synced to disk, plain HTTP on both, the same compiled load generator (`wrk`)
against the leader of each in turn. etcd's writes are `put`s through its HTTP gateway; ours are a new version
of a shared file: session checked, rights checked, request id remembered. Reported: acknowledged writes a
second, p50 and p99, CPU seconds of all three nodes per 1,000 writes, peak memory, and the time without a
successful write after `kill -9` of the leader.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.clusters import Cluster, Etcd, Trimaran
from benchmarks.processes import wait_until

UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.consensus", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--trials", type=int, default=20, help="kills of the leader")
    parser.add_argument("--only", choices=["trimaran", "etcd"])
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
    with tempfile.TemporaryDirectory(prefix="trimaran-bench-") as folder:
        clusters = [kind(Path(folder) / kind.name) for kind in kinds]
        try:
            for cluster in clusters:
                cluster.folder.mkdir()
                cluster.start()
            for clients in map(int, options.clients.split(",")):
                samples: dict[str, list[dict[str, float]]] = {cluster.name: [] for cluster in clusters}
                for _ in range(options.rounds):
                    for cluster in clusters:
                        samples[cluster.name].append(load(cluster, clients, options.seconds))
                for cluster in clusters:
                    row = {"cluster": cluster.name, "clients": clients} | medians(samples[cluster.name])
                    rows.append(row)
                    print(row, flush=True)
            for cluster in clusters:
                if options.trials:
                    gaps = [kill_leader(cluster, trial) for trial in range(options.trials)]
                    row = {
                        "cluster": cluster.name, "trials": options.trials, "no_write_seconds_median": round(statistics.median(gaps), 3),
                        "no_write_seconds_max": round(max(gaps), 3),
                    }  # fmt: skip
                    rows.append(row)
                    print(row, flush=True)
        finally:
            for cluster in clusters:
                cluster.stop()
    results.keep("consensus", rows)
    return 0


def load(cluster: Cluster, clients: int, seconds: int) -> dict[str, float]:
    """One run of `wrk` against the leader."""
    leader = cluster.leader()
    assert leader is not None, f"{cluster.name} has no leader"
    script = cluster.folder / "load.lua"
    script.write_text(cluster.load_script())
    threads = min(2, clients)
    before = cluster.cpu_seconds()
    done = subprocess.run(
        ["wrk", "-t", str(threads), "-c", str(clients), "-d", f"{seconds}s", "--latency", "--timeout", "10s",
         "-s", str(script), cluster.urls[leader]],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    cpu = cluster.cpu_seconds() - before
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", done)
    total = int(_find(r"(\d+) requests in", done))
    failed = int(bad.group(1)) if bad else 0
    if failed:
        print(f"{cluster.name}: {failed} of {total} requests were not acknowledged", file=sys.stderr)
    return {
        "writes_per_second": float(_find(r"Requests/sec:\s+([\d.]+)", done))
        * (total - failed)
        / max(total, 1),
        "p50_ms": _milliseconds(_find(r"(?m)^\s+50%\s+(\S+)", done)),
        "p99_ms": _milliseconds(_find(r"(?m)^\s+99%\s+(\S+)", done)),
        "cpu_seconds_per_1000": cpu / max(total - failed, 1) * 1000,
        "peak_mib": cluster.peak_bytes() / 2**20,
    }


def kill_leader(cluster: Cluster, trial: int) -> float:
    """Kill the leader, and write through the others until one is acknowledged; seconds that took."""
    wait_until(lambda: cluster.leader() is not None, 30, f"{cluster.name} has a leader")
    leader = cluster.leader()
    assert leader is not None
    others = [number for number in range(3) if number != leader]
    assert cluster.write_once(others[0], trial * 1000, 10), "a write before the kill"
    cluster.nodes[leader].kill()
    begun = time.monotonic()
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


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"the load generator said no {pattern!r}:\n{text}")
    return found.group(1)


def _milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


if __name__ == "__main__":
    raise SystemExit(main())
