"""Where this process's log goes: `HOME/peer.log`, bounded. Nothing of it reaches the terminal.

Owned here: the handler and its bounds. The file is opened by the first line that is logged, so that a command that
has nothing to log touches nothing. Trackers log to stderr by themselves (`cluster/app.py`).
"""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

BYTES_MAX = 4 << 20
KEPT_FILES = 1
_FORM = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"


def to_home(home: Path) -> None:
    """Send warnings and worse to the home's log file. Called once, before the event loop runs."""
    handler: logging.Handler
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            home / "peer.log", maxBytes=BYTES_MAX, backupCount=KEPT_FILES, encoding="utf-8", delay=True
        )
    except OSError:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(_FORM))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk must not print a traceback
