"""What every test starts from."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell without job control starts what it puts in the background with SIGINT ignored, and children inherit
    that. Tests press Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
