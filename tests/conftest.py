"""What every test starts from."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from xdist.remote import Producer

# On a busy machine any example takes longer than hypothesis likes; hanging is what pytest-timeout is for.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

ONE_WORKER = ("tests/chaos/test_live_rights.py",)  # a rig of a dozen processes, set up once for the file


def pytest_configure() -> None:
    """A shell without job control starts what it puts in the background with SIGINT ignored, and children inherit
    that. Tests press Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Scheduling(LoadScopeScheduling):
    """Each test by itself to whoever is free, but the files of `ONE_WORKER` whole. (`xdist_group` marks reach the
    scheduler no more with pytest 9.2: its nodes keep no changed id.)"""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return path if path in ONE_WORKER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)
