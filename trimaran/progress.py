"""Live progress of long work on a terminal: bars, rates, time left, sources, and the piece map.

Owned here: how a `peer.reports.Progress` looks, and the display that follows several of them. Left to
others: where they come from. Off a terminal nothing is drawn: a line says why something waits, and when it goes on.
With `--quiet` there is nothing at all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from peer.reports import Progress, State

from .output import harmless, lasting, rated, sized

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

WIDE_COLUMNS = 100
TOLD_AFTER_SECONDS = 1.0  # a wait that is over sooner is not worth a line
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_VERB = {
    State.HASHING: "hashing",
    State.QUEUED: "queued",
    State.DOWNLOADING: "downloading",
    State.WAITING: "waiting",
    State.PAUSED: "paused",
    State.VERIFYING: "verifying",
    State.COMPLETE: "complete",
}


def piece_map_line(piece_map: str, columns: int) -> str:
    """The map of at most 512 buckets (`'0'`..`'8'`: eighths held) drawn in `columns` blocks."""
    levels = [int(char) for char in piece_map if char in "012345678"]
    if not levels or columns <= 0:
        return ""
    line = []
    for column in range(min(columns, len(levels))):
        first = column * len(levels) // min(columns, len(levels))
        last = max(first + 1, (column + 1) * len(levels) // min(columns, len(levels)))
        part = levels[first:last]
        line.append(_EIGHTHS[sum(part) // len(part)])
    return "".join(line)


class Display:
    """`with Display(...) as display: work(on_progress=display.update)`."""

    def __init__(
        self, *, quiet: bool, lines: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`lines`: off a terminal, say why something waits."""
        self._shown = sys.stderr.isatty() and not quiet
        self._waits = _Waits(clock) if lines and not quiet and not self._shown else None
        self._latest: dict[tuple[str, str], Progress] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._shown:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True, highlight=False), refresh_per_second=8, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the display off the terminal; updates are ignored from here on."""
        self._waits = None
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, progress: Progress) -> None:
        if self._live is not None:
            self._latest[progress.group, progress.name] = progress
            self._live.update(self._draw(self._live.console.width))
        elif self._waits is not None:
            self._waits.update(progress)

    def _draw(self, columns: int) -> RenderableType:
        from rich.console import Group

        return Group(*(draw(each, columns) for each in self._latest.values()))


class _Waits:
    """One line at each change of why something waits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since: dict[tuple[str, str], tuple[str, float]] = {}  # the reason that holds now
        self._told: dict[tuple[str, str], str] = {}

    def update(self, progress: Progress) -> None:
        key, now = (progress.group, progress.name), self._clock()
        reason = progress.message if progress.state is State.WAITING else ""
        if key not in self._since or self._since[key][0] != reason:
            self._since[key] = reason, now
        if now - self._since[key][1] < TOLD_AFTER_SECONDS or self._told.get(key, "") == reason:
            return
        self._told[key] = reason
        what = harmless(f"{progress.group}/{progress.name}")
        print(
            f"{what} waits: {harmless(reason)}" if reason else f"{what} goes on", file=sys.stderr, flush=True
        )


def draw(progress: Progress, columns: int) -> RenderableType:
    """Two or three lines of text, none of them wider than the terminal."""
    from rich.text import Text

    share = progress.done_bytes / progress.size_bytes if progress.size_bytes else 1.0
    cells = max(10, min(40, columns - 60))
    full = min(cells, int(share * cells))
    lines = [
        Text.assemble(
            (f"{harmless(progress.name)} ", "bold"),
            (_VERB.get(progress.state, progress.state.value), "cyan"),
            (f"  {harmless(progress.message)}" if progress.message else "", "yellow"),
        ),
        Text.assemble(
            ("━" * full, "green"),
            ("━" * (cells - full), "bright_black"),
            f" {share:4.0%}  {sized(progress.done_bytes)} of {sized(progress.size_bytes)}"
            f"  {rated(progress.rate_bytes_per_second)}  {lasting(progress.seconds_left)} left"
            + (f"  {progress.peers} peer{'s' * (progress.peers != 1)}" if progress.peers else ""),
        ),
    ]
    if columns >= WIDE_COLUMNS and progress.piece_map:
        lines.append(
            Text.assemble(
                ("pieces ", "bright_black"), (piece_map_line(progress.piece_map, columns - 8), "blue")
            )
        )
    if progress.sources:
        told = ", ".join(
            f"{harmless(each.user) or each.peer_id[:8]} {sized(each.bytes)}"
            for each in sorted(progress.sources, key=lambda each: -each.bytes)[:4]
        )
        more = len(progress.sources) - 4
        lines.append(Text(f"from {told}" + (f" and {more} more" if more > 0 else ""), style="bright_black"))
    for line in lines:
        line.truncate(max(20, columns - 1), overflow="ellipsis")
    from rich.console import Group

    return Group(*lines)
