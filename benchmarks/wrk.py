"""One run of the compiled load generator `wrk`, and what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def run(url: str, script: str, folder: Path, clients: int, seconds: int, name: str) -> dict[str, float]:
    """Answers a second that were 2xx or 3xx, and the latencies of all."""
    path = folder / "load.lua"
    path.write_text(script)
    done = subprocess.run(
        ["wrk", "-t", str(min(2, clients)), "-c", str(clients), "-d", f"{seconds}s", "--latency",
         "--timeout", "10s", "-s", str(path), url],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", done)
    total = int(_find(r"(\d+) requests in", done))
    failed = int(bad.group(1)) if bad else 0
    if failed:
        print(f"{name}: {failed} of {total} requests were not acknowledged", file=sys.stderr)
    return {
        "acknowledged": total - failed,
        "per_second": float(_find(r"Requests/sec:\s+([\d.]+)", done)) * (total - failed) / max(total, 1),
        "p50_ms": _milliseconds(_find(r"(?m)^\s+50%\s+(\S+)", done)),
        "p99_ms": _milliseconds(_find(r"(?m)^\s+99%\s+(\S+)", done)),
    }


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if not found:
        raise RuntimeError(f"the load generator said no {pattern!r}:\n{text}")
    return found.group(1)


def _milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]
