"""One self-contained HTML file about a run: lanes for clients, nodes and peers on one time axis, bands
for faults, a strip of leaders and terms, downloads, verdicts, the first bad operation and the longest
good prefix. Made on every run, good or bad; people who would rather look than read start here.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_tests.checkers.cluster import LED
from chaos_tests.checkers.verdict import Verdict, held
from chaos_tests.history import FOREVER_NS, History, Operation, Transfer

WIDTH, LEFT, LANE, GAP, LABEL = 1400, 270, 16, 3, 48
END_COLOURS = {"ok": "#3a9d5d", "refused": "#7fb4d8", "fail": "#c9c9c9", "unknown": "#e8a33d"}
NODE_COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3"]
ROLE_COLOURS = {"leader": "#2f5d8a", "follower": "#b9cbe0", "candidate": "#e8a33d", "removed": "#777"}
PEER_COLOUR = "#8a9a5b"
SILENT_NS = 1_500_000_000
X = Callable[[int], float]  # nanoseconds to a place on the axis
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem;color:#222;max-width:1460px}
h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:1.6rem}
table{border-collapse:collapse} td:first-child{white-space:nowrap} td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.held{color:#24743f} .violated{color:#b3261e;font-weight:600} .unknown{color:#9a6a00}
svg{background:#fcfcfc;border:1px solid #ddd} text{font:11px system-ui,sans-serif;fill:#333}
.legend span{margin-right:1.2rem} .legend i{display:inline-block;width:.9rem;height:.7rem;margin-right:.3rem}
td{max-width:46rem;overflow-wrap:anywhere}
code{background:#f1f1f1;padding:.1rem .3rem}
"""


def write(
    path: Path,
    history: History,
    verdicts: Sequence[Verdict],
    *,
    title: str,
    replay: str,
    figures: dict[str, str],
) -> None:
    """Write the report. `replay` is the command that runs the same seed again."""
    bad = [verdict for verdict in verdicts if verdict.result != "held"]
    parts = [
        "<!doctype html><meta charset=utf-8>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{'Every check held.' if not bad else f'{len(bad)} of {len(verdicts)} checks did not hold.'} "
        f"Again: <code>{html.escape(replay)}</code></p>",
        _table([("figure", "value"), *figures.items()]),
        "<h2>Checks</h2>",
        _verdicts(verdicts),
        "<h2>Timeline</h2>",
        _legend(),
        _timeline(history, verdicts),
    ]
    parts.extend(_evidence(history, verdict) for verdict in bad)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows[1:])
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    return f"<table><tr>{head}</tr>{body}</table>"


def _legend() -> str:
    ends = {"ok": "acknowledged", "refused": "refused", "fail": "certainly not done", "unknown": "unknown"}
    colours = [(END_COLOURS[end], told) for end, told in ends.items()]
    colours += [
        ("#2f5d8a", "a node leads"),
        ("#b9cbe0", "it follows"),
        ("#c44e52", "a fault that bit"),
        ("#d8a0a0", "a fault that did not"),
        (PEER_COLOUR, "a peer can be reached"),
        ("#a9d5b7", "a download, and how far it is"),
    ]
    swatches = "".join(f"<span><i style='background:{colour}'></i>{told}</span>" for colour, told in colours)
    return f"<p class=legend>{swatches}<br>Hold the pointer over anything to read what it is.</p>"


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    order = {"violated": 0, "unknown": 1, "held": 2}
    verdicts = _folded(verdicts)
    rows = "".join(
        f"<tr><td class={v.result}>{v.result}</td><td>{html.escape(v.name)}</td><td>{v.checked:,}</td>"
        f"<td>{html.escape(v.message[:1500])}</td></tr>"
        for v in sorted(verdicts, key=lambda v: order[v.result])
    )
    return f"<table><tr><th>result</th><th>check</th><th>evidence</th><th></th></tr>{rows}</table>"


def _folded(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Checks that held for many keys or watchers in one row each; whatever did not hold keeps its own."""
    shown = [verdict for verdict in verdicts if verdict.result != "held"]
    alike: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.result == "held":
            alike["watch" if verdict.name.startswith("watch ") else verdict.name].append(verdict)
    for name, many in alike.items():
        message = many[0].message if len(many) == 1 else f"{len(many)} streams or keys, each by itself"
        shown.append(held(name, sum(verdict.checked for verdict in many), message))
    return shown


def _timeline(history: History, verdicts: Sequence[Verdict]) -> str:
    end_ns = max([history.end_ns, 1, *(f.end_ns for f in history.faults if f.end_ns < FOREVER_NS)])
    begun = [fault.begin_ns for fault in history.faults] + [
        transfer.begin_ns for transfer in history.transfers
    ]
    first_ns = max(0, min(begun, default=0) - 5 * 10**9)  # setting up is not shown
    scale = (WIDTH - LEFT - 10) / (end_ns - first_ns)

    def x(at_ns: int) -> float:
        return LEFT + (max(first_ns, min(at_ns, end_ns)) - first_ns) * scale

    shapes: list[str] = []
    y = 20.0
    y = _leader_strip(history, shapes, x, y)
    y = _node_lanes(history, shapes, x, y)
    kinds = list(dict.fromkeys(fault.kind for fault in sorted(history.faults, key=lambda f: f.begin_ns)))
    top = y
    for kind in kinds:
        shapes.append(f'<text x="4" y="{y + 12}">{html.escape(kind[:LABEL])}</text>')
        for fault in (f for f in history.faults if f.kind == kind):
            width = max(2.0, x(fault.end_ns) - x(fault.begin_ns))
            colour = "#c44e52" if fault.bit else "#d8a0a0"
            shapes.append(
                f'<rect x="{x(fault.begin_ns):.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{colour}" opacity=".75">'
                f"<title>{html.escape(f'{fault.kind} {fault.target} {fault.detail}')}</title></rect>"
            )
            if width > 7 * len(fault.target) + 6:
                shapes.append(
                    f'<text x="{x(fault.begin_ns) + 3:.1f}" y="{y + 12}" style="fill:#fff">{html.escape(fault.target)}</text>'
                )
        y += LANE + GAP
    for fault in history.faults:
        if fault.kind.startswith(("peer", "flash crowd")):
            continue  # a band through all lanes only for what happens to trackers
        width = max(1.0, x(fault.end_ns) - x(fault.begin_ns))
        shapes.insert(
            0,
            f'<rect x="{x(fault.begin_ns):.1f}" y="{top}" width="{width:.1f}" height="100%" fill="#f6dede" opacity=".35"/>',
        )
    y = _client_lanes(history, shapes, x, y + 8)
    y = _peer_lanes(history, shapes, x, y + 8)
    if history.healed_ns:
        shapes.append(
            f'<line x1="{x(history.healed_ns):.1f}" x2="{x(history.healed_ns):.1f}" y1="0" y2="{y}" stroke="#24743f" stroke-dasharray="4 3"/>'
        )
        shapes.append(f'<text x="{x(history.healed_ns) - 3:.1f}" y="12" text-anchor="end">faults end</text>')
    for verdict in verdicts:
        if verdict.first_bad_ns is not None:
            shapes.append(
                f'<line x1="{x(verdict.first_bad_ns):.1f}" x2="{x(verdict.first_bad_ns):.1f}" y1="0" y2="{y}" stroke="#b3261e" stroke-width="1.5"><title>{html.escape(verdict.name)}</title></line>'
            )
    step = max(1, round((end_ns - first_ns) / 1e9 / 12))
    for second in range(-(-first_ns // (step * 10**9)) * step, int(end_ns / 1e9) + 1, step):
        if x(second * 10**9) < WIDTH - 40:
            shapes.append(f'<text x="{x(second * 10**9):.1f}" y="{y + 14}">{second} s</text>')
    return f'<svg width="{WIDTH}" height="{y + 24:.0f}">{"".join(shapes)}</svg>'


def _leader_strip(history: History, shapes: list[str], x: X, y: float) -> float:
    nodes = sorted({sample.node for sample in history.samples})
    leads = [sample for sample in sorted(history.samples, key=lambda s: s.at_ns) if sample.role in LED]
    shapes.append(f'<text x="4" y="{y + 12}">leader and term</text>')
    spans: list[tuple[str, int, int, int]] = []
    for sample in leads:
        if spans and spans[-1][:2] == (sample.node, sample.term):
            spans[-1] = (sample.node, sample.term, spans[-1][2], sample.at_ns)
        else:
            spans.append((sample.node, sample.term, sample.at_ns, sample.at_ns))
    for node, term, begin, end in spans:
        colour = NODE_COLOURS[nodes.index(node) % len(NODE_COLOURS)]
        width = max(2.0, x(end) - x(begin))
        shapes.append(
            f'<rect x="{x(begin):.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{colour}"><title>{html.escape(node)} leads term {term}</title></rect>'
        )
        if width > 50:
            shapes.append(
                f'<text x="{x(begin) + 3:.1f}" y="{y + 12}" style="fill:#fff">{html.escape(node)} t{term}</text>'
            )
    return y + LANE + GAP


def _node_lanes(history: History, shapes: list[str], x: X, y: float) -> float:
    """When each node said anything, and as what."""
    for node in sorted({sample.node for sample in history.samples}):
        shapes.append(f'<text x="4" y="{y + 12}">{html.escape(node)}</text>')
        spans: list[tuple[str, int, int]] = []
        for sample in history.samples:
            if sample.node != node or sample.role in ("", "led"):
                continue
            if spans and spans[-1][0] == sample.role and sample.at_ns < spans[-1][2] + SILENT_NS:
                spans[-1] = (sample.role, spans[-1][1], sample.at_ns)
            else:
                spans.append((sample.role, sample.at_ns, sample.at_ns))
        for role, begin, end in spans:
            width = max(1.0, x(end) - x(begin))
            colour = ROLE_COLOURS.get(role, "#d9a441")
            shapes.append(
                f'<rect x="{x(begin):.1f}" y="{y}" width="{width:.1f}" height="{LANE - 4}" fill="{colour}"><title>{html.escape(node)}: {html.escape(role)}</title></rect>'
            )
        y += LANE + GAP
    return y


def _client_lanes(history: History, shapes: list[str], x: X, y: float) -> float:
    by_client: dict[str, list[Operation]] = defaultdict(list)
    for operation in history.operations:
        by_client[operation.client].append(operation)
    for client, operations in sorted(by_client.items()):
        shapes.append(f'<text x="4" y="{y + 12}">{html.escape(client[:LABEL])}</text>')
        drawn = -1.0  # where the last one ended: what is too short to see is drawn once for each end
        last: str = ""
        for operation in operations:
            begin, end = x(operation.call_ns), x(operation.end_ns)
            if end < drawn + 0.5 and operation.end == last:
                continue
            drawn, last = max(end, begin + 0.8), operation.end
            told = f"{operation.id} {operation.name} {operation.key} on {operation.node}: {operation.end} {operation.output!r} @{operation.revision}"
            shapes.append(
                f'<rect x="{begin:.1f}" y="{y}" width="{drawn - begin:.1f}" height="{LANE - 4}" fill="{END_COLOURS[operation.end]}"><title>{html.escape(told)}</title></rect>'
            )
        y += LANE + GAP
    return y


def _peer_lanes(history: History, shapes: list[str], x: X, y: float) -> float:
    """For each peer when it could be reached, and under it its downloads, as many rows as run at once."""
    living = {life.peer for life in history.lives}
    by_lane: dict[str, list[Transfer]] = {name: [] for name in sorted(living)}
    for transfer in sorted(history.transfers, key=lambda transfer: transfer.begin_ns):
        by_lane.setdefault(transfer.peer if transfer.peer in living else "crowds", []).append(transfer)
    for name, transfers in by_lane.items():
        shapes.append(f'<text x="4" y="{y + 12}">{html.escape(name[:LABEL])}</text>')
        lives = [life for life in history.lives if life.peer == name]
        for life in lives:
            begin, end = x(life.from_ns), x(life.to_ns)
            shapes.append(
                f'<rect x="{begin:.1f}" y="{y}" width="{max(1.0, end - begin):.1f}" height="4" fill="{PEER_COLOUR}"><title>{html.escape(name)} can be reached</title></rect>'
            )
        y += 6 if lives else 0
        rows: list[float] = []  # where the last bar of each ends
        for transfer in transfers:
            begin, end = x(transfer.begin_ns), x(transfer.end_ns)
            row = next((number for number, until in enumerate(rows) if until < begin), len(rows))
            rows[row : row + 1] = [max(end, begin + 2)]
            _transfer_bar(transfer, shapes, x, y + row * (LANE + GAP))
        y += max(1, len(rows)) * (LANE + GAP)
    return y


def _transfer_bar(transfer: Transfer, shapes: list[str], x: X, y: float) -> None:
    good = transfer.got_sha256 and transfer.got_sha256 == transfer.wanted_sha256
    told = f"{transfer.peer} gets {transfer.name}: {'right bytes' if good else 'did not end well'}"
    width = max(2.0, x(transfer.end_ns) - x(transfer.begin_ns))
    shapes.append(
        f'<rect x="{x(transfer.begin_ns):.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{"#a9d5b7" if good else "#efc0bd"}"><title>{html.escape(told)}</title></rect>'
    )
    if transfer.progress and transfer.size_bytes:
        points = " ".join(
            f"{x(at):.1f},{y + LANE - LANE * done / transfer.size_bytes:.1f}"
            for at, done in transfer.progress
        )
        shapes.append(
            f'<polyline points="{points}" fill="none" stroke="#1d5c33" stroke-width="1.5" pointer-events="none"/>'
        )


def _evidence(history: History, verdict: Verdict) -> str:
    """The operations that show a violation: the last is the first bad one, those before it the longest
    good prefix."""
    by_id = {operation.id: operation for operation in history.operations}
    shown = [by_id[number] for number in verdict.operations if number in by_id]
    head = f"<h2 class={verdict.result}>{html.escape(verdict.name)}</h2><p>{html.escape(verdict.message)}</p>"
    if not shown:
        return head
    rows = "".join(
        f"<tr><td>{o.id}</td><td>{o.call_ns / 1e9:.4f}</td><td>{'' if o.end_ns >= FOREVER_NS else f'{o.end_ns / 1e9:.4f}'}</td>"
        f"<td>{html.escape(o.client)}</td><td>{html.escape(o.node)}</td><td>{html.escape(o.name)} {html.escape(o.key)}</td>"
        f"<td>{html.escape(repr(o.input))}</td><td>{o.end} {html.escape(repr(o.output))}</td><td>{o.revision}</td></tr>"
        for o in shown[-60:]
    )
    return (
        f"{head}<p>The longest good prefix, and the first bad operation last ({len(shown)} in all):</p>"
        "<table><tr><th>id</th><th>call s</th><th>end s</th><th>client</th><th>node</th><th>operation</th>"
        f"<th>input</th><th>answer</th><th>revision</th></tr>{rows}</table>"
    )
