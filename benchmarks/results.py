"""Results, kept with date and machine: one JSON file a run under `benchmarks/results/`, a table on stdout."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(), "processor": model, "memory_gib": round(memory / 2**30, 1), "kernel": platform.release(),
        "python": platform.python_version(),
    }  # fmt: skip


def keep(name: str, rows: list[dict[str, Any]], note: str = "") -> Path:
    """Write the rows beside their date and machine, print them as a table; returns the file."""
    now = datetime.now(UTC)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{now:%Y-%m-%d}-{name}.json"
    document = {
        "benchmark": name,
        "at": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine(),
        "note": note,
        "rows": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text; rows with different columns make separate blocks."""
    blocks: list[tuple[tuple[str, ...], list[dict[str, Any]]]] = []
    for row in rows:
        columns = tuple(row)
        if not blocks or blocks[-1][0] != columns:
            blocks.append((columns, []))
        blocks[-1][1].append(row)
    out: list[str] = []
    for columns, group in blocks:
        cells = [
            list(columns),
            *[
                [f"{row[c]:g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
                for row in group
            ],
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        out += [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        ] + [""]
    return "\n".join(out)
