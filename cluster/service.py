"""The tracker service: what stands between HTTP and the replicated state.

Owned here: the parts of a running service and their start and stop. Left to others: the way of a
request (`http.py`), what each route does (`handlers/`), how a command becomes an answer (`proposals.py`).

    service = Service(consensus, machine, settings, authority)
    await service.start()          # after consensus.start(); returns at once, keys are put in the background
    app = build_app(service)       # cluster.http
    ...
    await service.stop()           # before consensus.stop(): ends watches, sends what was gathered
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.authority import Authority
from cluster.consensus import Consensus
from cluster.settings import ServiceSettings

if TYPE_CHECKING:
    from state_machine.machine import StateMachine


class Service:
    """One node's service. All of it belongs to the event loop's thread."""

    def __init__(
        self,
        consensus: Consensus,
        machine: StateMachine,
        settings: ServiceSettings,
        authority: Authority | None = None,  # None: insecure, peers get no certificates
        *,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.consensus = consensus
        self.machine = machine
        self.settings = settings
        self.authority = authority
        self.wall_ms = wall_ms
        self.monotonic = monotonic

    async def start(self) -> None:
        """Start the background work. Needs a running loop."""

    async def stop(self) -> None:
        """End watches and gathered work. Idempotent."""
