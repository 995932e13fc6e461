"""Writes `docs/reference/cli.md` from the command's own help: `python docs/reference/generate_cli.py`.

A test compares the file with what this makes, so the page cannot go stale.
"""

from __future__ import annotations

import io
from pathlib import Path

from cyclopts import App
from rich.console import Console

from trimaran.cli.app import build

PAGE = Path(__file__).with_name("cli.md")
_HEAD = """\
# The command

Made from the command's own help by `docs/reference/generate_cli.py`; do not edit. Exit codes: [exit-codes.md](exit-codes.md).
What each command answers with `--json`: [json.md](json.md). Settings files and the environment: [settings.md](settings.md).
"""


def made() -> str:
    return "\n".join([_HEAD, *(_section(path) for path in _paths(build()))])


def _paths(app: App, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name in app:
        if not name.startswith("-"):
            found += _paths(app[name], (*path, name))
    return found


def _section(path: tuple[str, ...]) -> str:
    out = io.StringIO()
    app = build(path[0] if path else "")
    app.help_print(list(path), console=Console(file=out, width=100, color_system=None, force_terminal=False))
    text = "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())
    level = "#" * min(3, 2 + (len(path) > 1))
    return f"{level} {' '.join(('trimaran', *path))}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(made(), encoding="utf-8")
