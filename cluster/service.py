"""The tracker service: what stands between HTTP and the replicated state.

Owned here: the parts of a running service, their start and stop, the background rounds, and the two
ways into consensus (`write`, `fresh`) with what their ends mean. Left to others: the way of a request
(`http.py`), what each route does (`handlers/`).

    service = Service(consensus, machine, settings, authority)
    await consensus.start()
    await service.start()          # returns at once; the node's key is put in the background
    runner = make_runner(service)  # cluster.http
    ...
    await service.stop()           # ends watches, sends what was gathered; then stop the runner and consensus
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from cluster import problems
from cluster.announcing import Announcer
from cluster.api import problems as kinds
from cluster.auth import Attempts, Passwords, Sessions, unauthenticated
from cluster.authority import Authority
from cluster.call import NO_SESSION, Call
from cluster.consensus import Applied, BarrierError, Consensus, Rejected, Role
from cluster.keys import KeyRing, NodeKeys
from cluster.leases import ROUNDS_PER_LEASE, Expiry, LeaseTimer, Renewals
from cluster.loop_probe import LoopProbe
from cluster.metrics import Metrics
from cluster.problems import ProblemError
from cluster.settings import ServiceSettings
from cluster.watch import HEARTBEAT_SLOTS, Hub
from state_machine import codec, outcomes, queries
from state_machine.commands import AnnouncePeers, AnyCommand, Prune
from state_machine.machine import StateMachine
from state_machine.outcomes import AnnounceValue

log = structlog.get_logger("cluster.service")

_STATUS_SECONDS: Final = 0.02  # how old leader and term on an answer may be
_KEY_ROUND_SECONDS: Final = 0.25  # until the first key is known; then `_KEY_REST_SECONDS`
_KEY_REST_SECONDS: Final = 5.0
_SESSION_ROUND_SECONDS: Final = 30.0
_BEHIND_ENTRIES_MAX: Final = 10_000


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
        self.metrics = Metrics()
        self.loop_probe = LoopProbe()
        self.key_ring = KeyRing(machine)
        self.keys = NodeKeys(machine, settings, consensus.node_id, self._propose_own, wall_ms)
        self.sessions = Sessions(machine, self.key_ring, settings, wall_ms)
        self.passwords = Passwords(settings)
        self.attempts = Attempts(settings, monotonic)
        self.hub = Hub(machine, settings)
        self.renewals = Renewals(self._propose_own)
        self.announcer = Announcer(
            machine, settings, self._propose_announcements, self.renewals.heard, self.barrier, wall_ms
        )
        self._expiry = Expiry(LeaseTimer(settings.lease_seconds), self._propose_own)
        self._envelope: dict[str, Any] = {}
        self._envelope_at = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._waiter_number = 0
        self._slot = 0
        self._sweeps: list[Callable[[], None]] = []
        self.metrics.attach(self)
        machine.follow(self.hub.publish, self.hub.restored)
        self.hub.when_revision(self._revision_moved)
        consensus.on_leadership(self._leadership)

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load or make the node's signing key and start the rounds. Raises `OSError`."""
        self.keys.load()
        self.loop_probe.start()
        settings = self.settings
        lease_round = settings.lease_seconds / ROUNDS_PER_LEASE
        self._start("heartbeat", self._heartbeat_round, settings.heartbeat_seconds / HEARTBEAT_SLOTS)
        self._start("sweep", self._sweep_round, settings.heartbeat_seconds)
        self._start("renewal", self.renewals.renew, settings.renew_seconds)
        self._start("expiry", self._expiry_round, lease_round)
        self._start("prune", self._prune_round, settings.prune_seconds)
        self._start("sessions", self._session_round, _SESSION_ROUND_SECONDS)
        self._tasks.append(asyncio.create_task(self._tend_keys(), name="trimaran keys"))

    def _start(self, name: str, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        self._tasks.append(asyncio.create_task(self._rounds(name, work, seconds), name=f"trimaran {name}"))

    async def stop(self) -> None:
        """End watches and send what was gathered. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        self.loop_probe.stop()
        self.hub.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.announcer.stop()
        self.passwords.close()

    async def _rounds(self, name: str, work: Callable[[], Awaitable[None]], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            due = max(due + seconds, loop.time())
            await self._guarded(name, work())

    async def _guarded(self, name: str, work: Awaitable[None]) -> None:
        """A defect in one round must not end the rounds: leases and heartbeats are others' safety."""
        try:
            await work
        except Exception:
            log.exception("a round failed unexpectedly", round=name)

    async def _tend_keys(self) -> None:
        while True:
            await self._guarded("keys", self.keys.tend())
            await asyncio.sleep(_KEY_REST_SECONDS if self.keys.ready else _KEY_ROUND_SECONDS)

    async def _heartbeat_round(self) -> None:
        self._slot = (self._slot + 1) % HEARTBEAT_SLOTS
        if self.consensus.quorum_age_seconds() < self.settings.heartbeat_quorum_seconds:
            self.hub.heartbeat(self._slot)

    async def _sweep_round(self) -> None:
        self.hub.sweep()
        for sweep in self._sweeps:
            sweep()

    def when_sweeping(self, sweep: Callable[[], None]) -> None:
        """Call it several times a second, to let go of what nobody uses."""
        self._sweeps.append(sweep)

    async def _expiry_round(self) -> None:
        if self.consensus.is_leader():
            await self._expiry.round(queries.peer_counter_parts(self.machine.state), self.monotonic())

    async def _prune_round(self) -> None:
        if self.consensus.is_leader():
            await self._propose_own(Prune(self.wall_ms() - round(self.settings.skew_seconds * 1000)))

    async def _session_round(self) -> None:
        self.hub.end_sessions(self.wall_ms(), self.sessions.lives)

    def _leadership(self, leads: bool) -> None:
        if leads:
            self._expiry.timer.forget()
        self._envelope_at = float("-inf")

    # --- what every answer says -----------------------------------------------------------------

    def envelope(self) -> dict[str, Any]:
        """node, leader, term and revision, as of now. The caller may change it no further."""
        now = self.monotonic()
        if now >= self._envelope_at + _STATUS_SECONDS:
            status = self.consensus.status()
            self._envelope = {"node": status.node_id, "leader": status.leader, "term": status.term}
            self._envelope_at = now
        self._envelope["revision"] = self.machine.state.revision
        return self._envelope

    def unready_reason(self) -> str:
        """Why this node cannot answer everything now; "" when it can."""
        status = self.consensus.status()
        if self._stopping:
            return "stopping"
        if status.role is Role.REMOVED:
            return "removed from the cluster"
        if status.disk_full:
            return "disk full"
        if not status.quorum:
            return "no quorum"
        if status.role is Role.LEARNER or status.committed - status.applied > _BEHIND_ENTRIES_MAX:
            return "catching up"
        if not self.keys.ready:
            return "its signing key is not known to the cluster yet"
        return ""

    # --- reading --------------------------------------------------------------------------------

    async def barrier(self) -> None:
        """Everything acknowledged before is applied here afterwards. Raises `ProblemError`."""
        try:
            await self.consensus.read_barrier(deadline_seconds=self.settings.read_seconds)
        except BarrierError:
            raise problems.of_barrier() from None

    async def fresh(self, call: Call) -> None:
        """Make sure that what is read next is as recent as the call asks. What is inside a group is
        always read linearizably: membership decides there. Raises `ProblemError`, also when the session
        turns out to have been ended."""
        consistency = call.query("consistency", "linearizable")
        if consistency not in ("linearizable", "stale"):
            raise ProblemError(
                kinds.INVALID, "consistency must be linearizable or stale.", field="consistency"
            )
        revision = call.query_int("min_revision")
        if consistency == "linearizable" or call.route.in_group:
            await self.barrier()
        if revision is not None and not await self.reached(revision, self.settings.read_seconds):
            raise ProblemError(
                kinds.BEHIND,
                f"This node is at revision {self.machine.revision}, behind {revision}.",
                field="min_revision",
                retry_after_seconds=0.2,
            )
        self.check_session(call)

    def check_session(self, call: Call) -> None:
        if call.session is not NO_SESSION and not self.sessions.lives(call.session):
            raise unauthenticated("The session was ended, by signing out or by a change of password.")

    async def reached(self, revision: int, seconds: float) -> bool:
        """Wait until this node has applied `revision`; False when it has not in time."""
        if self.machine.revision >= revision:
            return True
        future = asyncio.get_running_loop().create_future()
        self._waiter_number += 1
        heapq.heappush(self._waiters, (revision, self._waiter_number, future))
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            return False
        finally:
            if not future.done():
                future.cancel()
        return True

    def _revision_moved(self) -> None:
        while self._waiters and (
            self._waiters[0][2].cancelled() or self._waiters[0][0] <= self.machine.revision
        ):
            future = heapq.heappop(self._waiters)[2]
            if not future.done():
                future.set_result(None)

    # --- writing --------------------------------------------------------------------------------

    async def write(
        self, call: Call, command: AnyCommand, *, caller: str = "", request_hash: bytes = b""
    ) -> outcomes.Applied:
        """Propose a user's command under the call's request id. `caller` is the session's user unless
        given. Raises `ProblemError` for every end but *applied*."""
        if call.session is not NO_SESSION and not self.consensus.is_leader():
            # The leader has applied whatever was acknowledged anywhere; a follower may not have heard
            # yet that the session was ended.
            await self.barrier()
            self.check_session(call)
        data = codec.encode(
            command,
            caller=caller or call.user,
            request_id=call.request_id,
            request_hash=request_hash or call.request_hash(),
        )
        return await self._propose(data)

    async def write_repeatable(
        self, call: Call, command: AnyCommand, request_hash: bytes
    ) -> outcomes.Applied:
        """As `write`, for a caller whose session the command itself ends: the session is the handler's
        to check."""
        data = codec.encode(command, caller=call.user, request_id=call.request_id, request_hash=request_hash)
        return await self._propose(data)

    async def write_own(self, command: AnyCommand) -> outcomes.Applied:
        """Propose a command that carries no request id, being idempotent. Raises `ProblemError`."""
        return await self._propose(codec.encode(command))

    async def _propose(self, data: bytes) -> outcomes.Applied:
        end = await self.consensus.propose(data, deadline_seconds=self.settings.propose_seconds)
        if isinstance(end, Applied):
            outcome = end.result
            if isinstance(outcome, outcomes.Applied):
                self.metrics.proposal("applied")
                return outcome
            assert isinstance(outcome, outcomes.Refused), "the machine answers with an outcome"
            self.metrics.proposal("refused")
            raise problems.of_refused(outcome)
        if isinstance(end, Rejected):
            self.metrics.proposal("rejected")
            raise problems.of_rejected(end)
        self.metrics.proposal("unknown")
        raise problems.of_unknown(end)

    async def _propose_own(self, command: AnyCommand) -> bool:
        try:
            await self.write_own(command)
        except ProblemError as problem:
            log.info("a command of the node's own was not agreed on", problem=problem.kind.code)
            return False
        return True

    async def _propose_announcements(self, command: AnnouncePeers) -> tuple[AnnounceValue, ...]:
        outcome = await self.write_own(command)
        values: tuple[AnnounceValue, ...] = outcome.value
        return values
