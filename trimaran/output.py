"""What a person or a script sees: answers on stdout, everything else on stderr.

Owned here: JSON documents, tables, notes, errors, and how sizes, rates and times are written. Left to
others: live progress (`progress.py`), which error becomes which exit code (`failures.py`).

With `--json` stdout carries JSON documents, one a line, and nothing else; an error is one JSON document on
stderr. Names come from other people: control characters in them are shown as escapes, never sent to the
terminal.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from peer.reports import TrimaranError

    from .settings import Common


_NUMBER = re.compile(r"\d+(\.\d+)?( ?([KMGT]i)?B(/s)?|%)?")


def sized(count_bytes: float) -> str:
    """`1.4 GiB`"""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def counted(count: int, thing: str) -> str:
    """`1 piece`, `20 pieces`"""
    return f"{count} {thing}{'s' * (count != 1)}"


def rated(bytes_per_second: float) -> str:
    return f"{sized(bytes_per_second)}/s"


def lasting(seconds: float | None) -> str:
    """`1:02:03`, `4:05`; `-` when nobody can tell."""
    if seconds is None or seconds < 0 or seconds > 99 * 3600:
        return "-"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def harmless(text: str) -> str:
    """Control and formatting characters as escapes: a name cannot move the cursor or turn text around."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text
    )


def json_line(document: object) -> bytes:
    """One JSON document, from plain values and msgspec structs."""
    import msgspec
    import orjson

    return orjson.dumps(msgspec.to_builtins(document), option=orjson.OPT_APPEND_NEWLINE)


def console(*, stderr: bool = False) -> Console:
    """Rich's console: as wide as the terminal, unbounded when piped, so that no row is cut."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr, width=None if stream.isatty() else 4096, highlight=False, soft_wrap=not stream.isatty()
    )


@dataclass(frozen=True, slots=True)
class Output:
    json: bool = False
    quiet: bool = False

    @classmethod
    def of(cls, common: Common) -> Output:
        return cls(json=common.json, quiet=common.quiet)

    def answer(self, document: object, for_people: Callable[[], None] | str) -> None:
        """The command's answer: the document with `--json`, else what is for people."""
        if self.json:
            self.write(json_line(document))
        elif callable(for_people):
            for_people()
        else:
            self.say(for_people)

    def write(self, data: bytes) -> None:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()

    def say(self, text: str) -> None:
        self.write(f"{text}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace"))

    def note(self, text: str) -> None:
        """Something worth knowing that is no answer: stderr, hidden by `--quiet`."""
        if not self.quiet:
            print(harmless(text), file=sys.stderr, flush=True)

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
        """Aligned columns; numbers to the right. `empty` is said when there are no rows."""
        listed = [[harmless(str(cell)) for cell in row] for row in rows]
        if not listed:
            self.note(empty)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for index, head in enumerate(heads):
            numeric = all(_NUMBER.fullmatch(row[index]) for row in listed)
            table.add_column(head, justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
        for row in listed:
            table.add_row(*(Text(cell) for cell in row))
        out = console()
        if not sys.stdout.isatty():
            out.width = max(20, out.measure(table).maximum)
        with out.capture() as captured:
            out.print(table)
        lines = (line.rstrip() for line in captured.get().splitlines())
        self.say("\n".join(lines))

    def error(self, error: TrimaranError) -> None:
        """Two lines for people (what happened, what to do next), or the JSON document."""
        if self.json:
            document: dict[str, Any] = {
                "error": {
                    "code": error.code,
                    "message": error.message,
                    "outcome": error.outcome,
                    "hint": error.hint,
                }
            }
            sys.stderr.flush()
            sys.stderr.buffer.write(json_line(document))
            sys.stderr.flush()
            return
        message = harmless(error.message)
        if error.outcome == "indefinite":
            message += " It may have taken effect."
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        label = "\x1b[1;31merror:\x1b[0m" if colour else "error:"
        lines = [f"{label} {message}"]
        if error.hint:
            lines.append(f"  {harmless(error.hint)}")
        print("\n".join(lines), file=sys.stderr, flush=True)
