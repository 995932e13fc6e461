"""A picture of a run: one bar chart a scenario, time to the last byte, shorter is better. Plain SVG."""

from __future__ import annotations

import html
from collections import defaultdict
from pathlib import Path
from typing import Any

WIDTH, LABEL, BAR, GAP = 760, 170, 20, 6


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    by_scenario: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario"]].append(row)
    shapes: list[str] = []
    y = 24
    for scenario, group in by_scenario.items():
        shapes.append(f'<text x="8" y="{y}" font-weight="600">{html.escape(scenario)}</text>')
        y += 10
        longest = max(row["last_seconds"] for row in group)
        for row in group:
            width = max(2.0, (WIDTH - LABEL - 170) * row["last_seconds"] / longest)
            colour = "#1f6f8b" if row["contender"].startswith("trimaran") else "#b9b9b9"
            said = f"{row['last_seconds']:.2f} s, {row['cpu_seconds_per_gb']:.2f} CPU s/GB"
            if "of_bound" in row:
                said += f", {row['of_bound']:.2f} of bound"
            shapes.append(
                f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{html.escape(row["contender"])}</text>'
                f'<rect x="{LABEL}" y="{y}" width="{width:.0f}" height="{BAR}" fill="{colour}"/>'
                f'<text x="{LABEL + width + 6:.0f}" y="{y + 14}">{said}</text>'
            )
            y += BAR + GAP
        y += 26
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 120}" height="{y}" font-family="system-ui,sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )
