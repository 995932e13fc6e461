"""One simulated node: its folder, and the process on it while there is one.

Owned here: starting the real node code on a simulated clock, disk and network, what is checked as it starts, and what may
come out of its callbacks. When it starts, is killed or loses power is the world's and the weather's.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from chaos_tests.simulation.clock import Event, ProcessRuntime
from chaos_tests.simulation.disk import ProcessEnds, SimulatedDisk, SimulatedSyncer
from chaos_tests.simulation.network import SimulatedLinks
from chaos_tests.simulation.replica import SimulatedReplica
from cluster.consensus import ConsensusStartError, NodeInfo
from cluster.raft.core import LinkEvents, RaftCore
from cluster.raft.entries import CONFIGURATION
from cluster.raft.messages import Message

if TYPE_CHECKING:
    from chaos_tests.simulation.world import World


class CallerGoneError(Exception):
    """Raised out of a caller's callback, as a future that was cancelled does."""


class ViolationError(BaseException):
    """The run is over: something that must never happen has happened."""


class Process:
    def __init__(self, world: World, node_id: str, founders: tuple[NodeInfo, ...]) -> None:
        self.world = world
        self.node_id = node_id
        self.founders = founders
        self.disk = SimulatedDisk(random.Random(world.chance.getrandbits(64)), world.bites)
        self.runtime: ProcessRuntime | None = None
        self.syncer: SimulatedSyncer | None = None
        self.core: RaftCore | None = None
        self.replica: SimulatedReplica | None = None
        self.links: SimulatedLinks | None = None
        self.started_once = False
        self.damaged = False
        self.safe_index = 0  # what it held when the process ended
        self.refused: str | None = None  # why it would not start
        self.ended: str | None = None  # why it ended itself
        self.checked_commit = 0
        self.checked_resumed = 0
        self.estranged_seconds = 0
        self.checked_change = (0, 0)  # (term, index) of the latest change it made as leader

    @property
    def up(self) -> bool:
        return self.core is not None

    @property
    def held_index(self) -> int:
        """Up to where it has everything on its disk, in the log or in a snapshot."""
        if self.core is None:
            return self.safe_index
        meta = self.core.store.latest()
        return max(self.core.guard.journal.synced_index, meta.index if meta is not None else 0)

    @property
    def awake(self) -> bool:
        return self.core is not None and self.runtime is not None and not self.runtime.paused

    def start(self) -> None:
        world = self.world
        syncer = SimulatedSyncer(
            world.clock, random.Random(world.chance.getrandbits(64)), lambda: world.kill(self)
        )
        runtime = ProcessRuntime(world.clock, world.chance, syncer)
        syncer.deliver = runtime.call_soon
        runtime.around = self._around
        replica = world.new_replica(self)
        self.runtime, self.syncer, self.replica = runtime, syncer, replica
        settings = world.settings(self)
        self.checked_commit = self.checked_resumed = 0
        self.ended = None
        try:
            self.core = RaftCore(
                settings,
                self.disk,
                runtime,
                self._make_links,
                replica,
                world.rig.corrections,
                world.rig.open_journal,
            )
            self.started_once = True
            self.core.on_fatal(self._fatal)
            self.core.begin()
        except ConsensusStartError as error:
            self._gone()
            if "start the node again" in str(error):
                # The disk failed, or had no room, while it was read: nothing is known to be wrong with what it holds.
                world.bites["start_failed_by_disk"] += 1
                world.clock.later(1.0, lambda: world.restart(self))
            else:
                world.bites["refused_to_start"] += 1
                self.refused = str(error)
                if not self.damaged:
                    world.violation("refused to start without damage", f"{self.node_id}: {error}")
            world.log("refused", self.node_id)
            return
        except ProcessEnds:
            self._gone()
            world.log("ended at start", self.node_id)
            return
        world.network.start(self)
        world.log("start", self.node_id)
        if self.core.guard.last_index < self.safe_index and not self.damaged:
            world.violation(
                "synced entries are gone after a restart",
                f"{self.node_id} had {self.safe_index}, has {self.core.guard.last_index}",
            )
        changes = [index for command, index, _ in self.core.guard.journal[:] if command[:1] == CONFIGURATION]
        if changes and changes[-1] > max(1, self.core.membership.current_index):
            world.violation(
                "a change in the log is forgotten by a restart", f"{self.node_id} at index {changes[-1]}"
            )

    def _make_links(self, events: LinkEvents) -> SimulatedLinks:
        self.links = SimulatedLinks(self.world.network, self.node_id)
        return self.links

    def _gone(self) -> None:
        if self.runtime is not None:
            self.runtime.alive = False
        if self.syncer is not None:
            self.syncer.alive = False
        self.core = self.runtime = self.syncer = self.links = None

    def stop(self) -> None:
        """As `kill -9` does: what the kernel has stays."""
        if self.core is not None:
            self.safe_index = self.held_index
        self._gone()
        self.disk.disarm()
        self.world.network.stop(self.node_id)

    def _fatal(self, reason: str) -> None:
        self.ended = reason
        self.world.node_ended(self, reason)

    def _around(self, callback: Callable[[], None]) -> None:
        world = self.world
        try:
            callback()
        except CallerGoneError:
            pass  # the loop logs it and goes on
        except ViolationError:
            raise
        except ProcessEnds:
            world.kill(self)
            return
        except Exception:
            world.violation("exception", f"{self.node_id}: {traceback.format_exc()}")
        if self.core is not None:
            world.check(self)

    # -- Endpoint

    def wants(self, node_id: str) -> bool:
        return self.links is not None and node_id in self.links.wanted

    def knows(self, node_id: str) -> bool:
        return self.core is not None and self.core.membership.knows(node_id) is not None

    def deliver(self, call: Callable[[], None]) -> None:
        if self.runtime is not None:
            self.runtime.run(Event(call))

    def connected(self, node_id: str) -> None:
        if self.core is not None:
            self.core.on_connected(node_id)

    def disconnected(self, node_id: str) -> None:
        if self.core is not None:
            self.core.on_disconnected(node_id)

    def message(self, node_id: str, message: Message) -> None:
        if self.core is not None:
            self.core.on_message(node_id, message)
