"""How help looks: plain text in two columns, the same on a terminal, in a pipe and in the docs."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_LEFT_COLUMNS_MAX = 26


class TwoColumns:
    """Cyclopts' `HelpFormatter`. Measures each panel's names, and wraps what is said about them."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        rows = [(self._label(entry, panel.format), self._about(entry)) for entry in panel.entries]
        if not rows:
            return
        left = min(_LEFT_COLUMNS_MAX, max(len(label) for label, _ in rows)) + 2
        width = max(40, min(console.width, 110))
        lines = [f"{_plain(panel.title)}:"]
        for label, about in rows:
            wrapped = textwrap.wrap(about, width - left - 2) or [""]
            if len(label) > left - 2:
                lines.append(f"  {label}")
            else:
                lines.append(f"  {label:<{left}}{wrapped.pop(0)}".rstrip())
            lines += [" " * (left + 2) + each for each in wrapped]
        _say(console, "\n".join(lines))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        text = _plain(usage).strip()
        if text:
            _say(console, text if text.startswith("Usage:") else f"Usage: {text}")

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        width = max(40, min(console.width, 110))
        paragraphs = _plain(description).replace("`", "").strip().split("\n\n")
        if paragraphs != [""]:
            _say(console, "\n\n".join(textwrap.fill(" ".join(each.split()), width) for each in paragraphs))

    @staticmethod
    def _label(entry: HelpEntry, kind: str) -> str:
        if kind == "command":
            return ", ".join((*entry.positive_names, *entry.positive_shorts))
        return ", ".join(entry.display_labels_with_metavar)

    @staticmethod
    def _about(entry: HelpEntry) -> str:
        about = " ".join(_plain(entry.description).replace("`", "").split())
        if entry.choices:
            about += f" One of: {', '.join(entry.choices)}."
        return f"{about} (required)" if entry.required else about


def _plain(thing: Any) -> str:
    """The text of a string, of rich's text, or of what cyclopts wraps around them."""
    if thing is None:
        return ""
    if isinstance(thing, str):
        return thing
    if hasattr(thing, "plain"):
        return str(thing.plain)
    if hasattr(thing, "primary_renderable"):
        return _plain(thing.primary_renderable)
    if hasattr(thing, "markup"):
        return str(thing.markup)
    return str(thing)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print()
