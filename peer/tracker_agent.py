"""This peer's dealings with the trackers, as long as it runs: what it says, what it is told, what it may.

Owned here: announcing what is here and what is not any more, a token for each group (renewed at half its life),
the peer's certificate, the watch on the groups it takes part in, and what is kept in the home so that an outage of all
trackers is survived: tokens, public keys, withdrawals. Left to others: which tracker is asked (the client),
what follows from the news (`TrackerEvents`, which the engine is).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import random
import time
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeAlias

import msgspec
from msgspec import Struct

from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import ApiProblem, HistoryGone, TrackerError
from cluster.api.tokens import VerifyingKey
from cluster.api.watching import Heartbeat
from state_machine import limits

from .access import Access
from .identity import Identity
from .known import Known
from .records import Records
from .trouble import refused

log = logging.getLogger("trimaran.peer.trackers")

GATHER_SECONDS: Final = 0.05
PROGRESS_SECONDS: Final = 5.0  # between summaries of a download that goes on
RETRY_SECONDS: Final = 0.5
RETRY_SECONDS_MAX: Final = 10.0
AWAY_SECONDS: Final = 3.0  # without a heartbeat
CHECK_SECONDS: Final = 1.0
SAVED_SECONDS: Final = 5.0  # between writes of what is kept for outages, and tries when there is no room
SWARMS_ASKED_MAX: Final = 32  # of a group, once, so that an outage finds this peer prepared
SWARMS_ASKED_EVERY_SECONDS: Final = 0.05

FactKey: TypeAlias = tuple[str, str, str]  # group, name, manifest_id


class Held(Struct, frozen=True):
    pieces: int
    complete: bool


class KeptToken(Struct, frozen=True):
    token: str
    issued_at_ms: int
    expires_at_ms: int


class _Kept(Struct):
    """What is kept in the home for outages."""

    user: str = ""
    tokens: dict[str, KeptToken] = {}
    keys: list[t.SigningKeyView] = []
    revocations: dict[str, list[t.RevocationView]] = {}


class TrackerEvents(Protocol):
    """Called on the event loop; must neither block nor raise."""

    def swarm_peer(self, group: str, name: str, peer: dict[str, Any]) -> None: ...
    def swarm_peer_left(self, group: str, name: str, peer_id: str, manifest_id: str) -> None: ...
    def rights_changed(self) -> None: ...
    def file_removed(self, group: str, name: str) -> None: ...
    def token_renewed(self, group: str) -> None: ...
    def token_expired(self, group: str) -> None: ...
    def group_lost(self, group: str, reason: str) -> None: ...
    def fact_dropped(self, key: FactKey, reason: str) -> None: ...
    def trackers_away(self) -> None: ...
    def trackers_back(self) -> None: ...


class TrackerAgent:
    """Made for a signed-in user; `start`, then `stop` (which says goodbye)."""

    def __init__(
        self,
        *,
        client: TrackerClient,
        identity: Identity,
        records: Records,
        access: Access,
        events: TrackerEvents,
        user: str,
    ) -> None:
        self._client = client
        self._identity = identity
        self._records = records
        self._access = access
        self._events = events
        self.user = user
        self.addresses: list[str] = []
        self._facts: dict[FactKey, Held] = {}
        self._said: dict[FactKey, Held] = {}
        self._gone: set[FactKey] = set()
        self._unsaved = False  # rights that found no room
        self._released: set[FactKey] = set()  # since the last announcement began
        self._whole = True
        self._dirty = asyncio.Event()
        self._groups: set[str] = set()
        self._expired: set[str] = set()
        self._renewals: set[str] = set()  # under way
        self._regroup = asyncio.Event()
        self._kept = self._load()
        self.known = Known(records, user)
        self._caught_up: set[str] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat_at = float("-inf")
        self.away = False
        self._keys_wanted = asyncio.Event()
        self._progress_at = 0.0
        self.session_ended = False
        self.revision = 0  # of the last announcement
        access.key_wanted = self._keys_wanted.set

    # --- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        for work in (self._announcing(), self._watching(), self._renewing(), self._listening()):
            task = asyncio.create_task(work)
            self._tasks.add(task)

    async def stop(self, *, leaving: bool) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for waiter in self._waiters:
            waiter.cancel()
        if self.known.changed:
            await self._keep(*self.known.packed())
        if leaving and not self._whole:
            with contextlib.suppress(TrackerError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._client.within(2.0).announce(
                        self._identity.peer_id,
                        t.AnnounceBody(addresses=[], facts=[], whole=True, leaving=True),
                    )

    def _load(self) -> _Kept:
        kept = _Kept()
        body = self._records.setting("rights")
        if body is not None:
            with contextlib.suppress(msgspec.DecodeError):
                kept = msgspec.msgpack.decode(body, type=_Kept)
        if kept.user != self.user:
            kept = _Kept(user=self.user)
        self._use_keys(kept.keys)
        for group, views in kept.revocations.items():
            self._use_revocations(group, views)
        return kept

    def _save(self) -> None:
        self._unsaved = False
        self._later(self._save_rights(msgspec.msgpack.encode(self._kept)))

    async def _save_rights(self, body: bytes) -> None:
        if not await self._keep("rights", body):
            self._unsaved = True

    async def _keep(self, name: str, body: bytes) -> bool:
        """False when there is no room: it is for outages, and work goes on without."""
        try:
            await asyncio.to_thread(self._records.put_setting, name, body)
        except OSError as error:
            log.warning("not kept for an outage: %s", error.strerror or error)
            return False
        return True

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- what is here ---------------------------------------------------------------------------

    def hold(self, key: FactKey, pieces: int, *, complete: bool) -> None:
        """This much of it is here, and offered."""
        held = Held(pieces, complete)
        before = self._facts.get(key)
        self._facts[key] = held
        self._gone.discard(key)
        self._join(key[0])
        urgent = before is None or (complete and not before.complete) or key not in self._said
        if urgent:
            self._dirty.set()

    def release(self, key: FactKey) -> None:
        """It is offered no more."""
        if self._facts.pop(key, None) is not None:
            # Said before or being said now: should it be held again, it must be said again.
            self._said.pop(key, None)
            self._released.add(key)
            self._gone.add(key)
            self._dirty.set()

    def take_part(self, group: str) -> None:
        """A token for the group, and its news, are wanted from here on."""
        self._join(group)

    def _join(self, group: str) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self._regroup.set()

    def leave_group(self, group: str) -> None:
        self._groups.discard(group)
        self._kept.tokens.pop(group, None)
        self.known.group_lost(group)
        self._caught_up.discard(group)
        for key in [key for key in self._facts if key[0] == group]:
            del self._facts[key]
            self._said.pop(key, None)
        self._regroup.set()
        self._save()

    async def said(self) -> None:
        """Return when all that was told until now has been announced. Raises TrackerError when trackers refuse
        or stay away for one attempt."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._dirty.set()
        await waiter

    async def _announcing(self) -> None:
        pause, interval = RETRY_SECONDS, 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._dirty.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self._dirty.clear()
            waiters, self._waiters = self._waiters, []
            try:
                interval = await self._announce()
                pause = RETRY_SECONDS
                _settle(waiters, None)
            except TrackerError as error:
                _settle(waiters, error)
                if isinstance(error, ApiProblem) and error.code == "unauthenticated":
                    self._end_session()
                    return
                if refused(error):
                    log.warning("announcing was refused: %s", error.message)
                    self._whole = True
                    with contextlib.suppress(TrackerError):
                        await self.certify()
                interval = pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def _announce(self) -> float:
        facts = dict(self._facts)
        whole = self._whole
        gone = set(self._gone)
        self._released.clear()
        if whole:
            changed = list(facts.items())
        else:
            changed = [(key, held) for key, held in facts.items() if self._said.get(key) != held]
        bodies = [_fact(key, held) for key, held in changed]
        if not whole:
            bodies += [_fact(key, Held(0, False), gone=True) for key in gone]
        answer: t.AnnounceAnswer | None = None
        first = True
        while first or bodies:
            part, bodies = bodies[: limits.FACTS_PER_ANNOUNCE_MAX], bodies[limits.FACTS_PER_ANNOUNCE_MAX :]
            answer = await self._client.announce(
                self._identity.peer_id,
                t.AnnounceBody(addresses=self.addresses, facts=part, whole=whole and first),
            )
            first = False
            for dropped in answer.dropped:
                key = (dropped.group, dropped.name, dropped.manifest_id)
                if key in facts:
                    self._facts.pop(key, None)
                    facts.pop(key, None)
                    self._events.fact_dropped(key, dropped.reason)
        assert answer is not None
        self.revision = max(self.revision, answer.revision)
        self._heard()
        self._said = {key: held for key, held in facts.items() if key not in self._released}
        self._gone -= gone - self._released
        self._whole = answer.whole_wanted
        if self._whole:
            return 0.0
        unsaid = any(self._said.get(key) != held for key, held in self._facts.items())
        soon = PROGRESS_SECONDS if unsaid or self._going_on() else float("inf")
        return min(soon, answer.announce_seconds * random.uniform(0.7, 1.0))  # noqa: S311 - jitter

    def _going_on(self) -> bool:
        return any(not held.complete for held in self._facts.values())

    # --- rights ---------------------------------------------------------------------------------

    def token(self, group: str) -> str | None:
        """A token that counts now."""
        kept = self._kept.tokens.get(group)
        return kept.token if kept is not None and kept.expires_at_ms > _now_ms() else None

    async def ensure_token(self, group: str) -> str:
        """A token, from the home or from a tracker. Raises TrackerError."""
        token = self.token(group)
        if token is None or self._old(group):
            try:
                await self._renew(group)
            except TrackerError as error:
                if token is None or refused(error):
                    raise
        self._join(group)
        found = self.token(group)
        assert found is not None
        return found

    def _old(self, group: str) -> bool:
        kept = self._kept.tokens.get(group)
        if kept is None:
            return True
        return _now_ms() > kept.issued_at_ms + (kept.expires_at_ms - kept.issued_at_ms) // 2

    def _seconds_to_an_end(self) -> float:
        """Until the next token ends. Seeders end with it to the moment: whoever waits should hear why as soon."""
        now = _now_ms()
        ends = [kept.expires_at_ms - now for kept in self._kept.tokens.values() if kept.expires_at_ms > now]
        return (min(ends) + 1) / 1000 if ends else float("inf")

    async def _renew(self, group: str) -> None:
        answer = await self._client.issue_token(group, self._identity.peer_id)
        # Counted from our own clock: what another clock says of "now" must not lengthen it here.
        life = answer.expires_at_ms - answer.issued_at_ms
        now = _now_ms()
        self._kept.tokens[group] = KeptToken(answer.token, now, min(answer.expires_at_ms, now + life))
        self._expired.discard(group)
        self._save()
        self._events.token_renewed(group)

    async def certify(self) -> None:
        """Bind this peer to the user and get its certificate. Raises TrackerError."""
        answer = await self._client.put_peer(self._identity.peer_id, self._identity.request_pem())
        await asyncio.to_thread(self._identity.certify, answer.certificate_pem)

    async def _renewing(self) -> None:
        certify_at = saved_at = 0.0
        while True:
            pause = CHECK_SECONDS * random.uniform(0.7, 1.3)  # noqa: S311 - jitter
            await asyncio.sleep(min(pause, self._seconds_to_an_end()))
            for group in list(self._groups):
                if self.token(group) is None and group not in self._expired:
                    self._expired.add(group)
                    self._events.token_expired(group)
                # Not waited for: where no tracker answers it takes long, and tokens end meanwhile.
                if self._old(group) and group not in self._renewals:
                    self._renewals.add(group)
                    self._later(self._try_renew(group))
            now = time.monotonic()
            if now >= certify_at and self._identity.renew_in_seconds() <= 0:
                certify_at = now + 60.0
                self._later(self._try_certify())
            self._events.rights_changed()  # tokens of others end by themselves, too
            if now >= saved_at and (self.known.changed or self._unsaved):
                saved_at = now + SAVED_SECONDS
                if self._unsaved:
                    self._save()
                if self.known.changed and not await self._keep(*self.known.packed()):
                    self.known.changed = True

    async def _try_certify(self) -> None:
        with contextlib.suppress(TrackerError):
            await self.certify()

    async def _try_renew(self, group: str) -> None:
        try:
            await self._renew(group)
        except TrackerError as error:
            if isinstance(error, ApiProblem) and error.code == "denied":
                self._events.group_lost(group, "this user is no longer a member of the group")
            elif isinstance(error, ApiProblem) and error.code == "unauthenticated":
                self._end_session()
        finally:
            self._renewals.discard(group)

    def _end_session(self) -> None:
        if not self.session_ended:
            self.session_ended = True
            log.warning("the session of %s has ended; sign in again to go on sharing", self.user)

    # --- news -----------------------------------------------------------------------------------

    async def _watching(self) -> None:
        pause = RETRY_SECONDS
        while True:
            groups = sorted(self._groups)
            self._regroup.clear()
            try:
                since = await self._list_rights(groups)
                pause = RETRY_SECONDS
                reading = asyncio.create_task(self._follow(groups, since))
                waiting = asyncio.create_task(self._regroup.wait())
                try:
                    await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
                    if reading.done():
                        reading.result()
                finally:
                    for task in (reading, waiting):
                        task.cancel()
                    await asyncio.gather(reading, waiting, return_exceptions=True)
            except HistoryGone:
                continue
            except TrackerError as error:
                if isinstance(error, ApiProblem) and error.code == "unauthenticated":
                    self._end_session()
                    return
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def _list_rights(self, groups: Iterable[str]) -> int:
        """Read keys and withdrawals as they are; the revision from which changes count."""
        keys = await self._client.list_keys()
        self._heard()
        self._kept.keys = keys.keys
        self._use_keys(keys.keys)
        since = keys.revision
        for group in groups:
            try:
                answer = await self._client.list_revocations(group)
                quarantine = await self._client.list_quarantine(group)
            except ApiProblem as problem:
                if problem.code != "denied":
                    raise
                self._events.group_lost(group, "this user is no longer a member of the group")
                continue
            since = min(since, answer.revision, quarantine.revision)
            self._kept.revocations[group] = answer.revocations
            self._use_revocations(group, answer.revocations)
            self._access.quarantined[group] = frozenset(peer.peer_id for peer in quarantine.peers)
        self._save()
        self._events.rights_changed()
        for group in groups:
            if group in self._groups and group not in self._caught_up:
                self._caught_up.add(group)
                self._later(self._catch_up(group))
        return since

    async def _catch_up(self, group: str) -> None:
        """Learn once what the group shares and who has the latest of it; the watch tells of what follows."""
        await asyncio.sleep(random.uniform(0.0, CHECK_SECONDS))  # noqa: S311 - jitter
        try:
            files = (await self._client.list_files(group)).files
            self.known.listed(group, files)
            for file in sorted(files, key=lambda file: file.shared_at, reverse=True)[:SWARMS_ASKED_MAX]:
                answer = await self._client.show_swarm(group, file.name)
                self.known.swarm(answer.manifest_id, answer.peers)
                await asyncio.sleep(SWARMS_ASKED_EVERY_SECONDS)
        except TrackerError:
            self._caught_up.discard(group)

    async def _follow(self, groups: list[str], since: int) -> None:
        prefixes = [f"/groups/{group}" for group in groups] + ["/keys"]
        async with aclosing(self._client.watch(prefixes, since)) as news:  # type: ignore[type-var]
            async for item in news:
                self._heard()
                if isinstance(item, Heartbeat):
                    continue
                for event in item.events:
                    self._take(event, item.revision)

    def _take(self, event: t.WatchEvent, revision: int) -> None:
        parts = event.path.split("/")
        if parts[1] == "keys":
            self._keys_wanted.set()
            return
        if len(parts) < 3:
            return
        group = parts[2]
        value: dict[str, Any] = event.value if isinstance(event.value, dict) else {}
        match event.type:
            case "swarm.changed":
                self.known.took(str(value.get("manifest_id", "")), value)
                self._events.swarm_peer(group, parts[4], value)
            case "swarm.left":
                peer_id, manifest_id = str(value.get("peer_id", parts[-1])), str(value.get("manifest_id", ""))
                if peer_id == self._identity.peer_id and (group, parts[4], manifest_id) in self._facts:
                    self._dirty.set()  # others could not reach us; an announcement says that we are here
                self.known.left(manifest_id, peer_id)
                self._events.swarm_peer_left(group, parts[4], peer_id, manifest_id)
            case "member.removed":
                user = str(value.get("user", parts[-1]))
                self._revoke(group, int(value.get("epoch", revision)), user=user)
                if user == self.user:
                    self._events.group_lost(group, "this user is no longer a member of the group")
            case "group.deleted":
                self._revoke(group, int(value.get("epoch", revision)))
                self._events.group_lost(group, "the group was deleted")
            case "file.removed":
                epoch = int(value.get("epoch", revision))
                revoked = {str(each) for each in value.get("revoked_manifest_ids", ())}
                for manifest_id in revoked:
                    self._revoke(group, epoch, manifest_id=manifest_id)
                self.known.removed(group, parts[4])
                self._events.file_removed(group, parts[4])
            case "file.published" | "file.replaced":
                self.known.take(group, parts[4], value)
                self._access.revocations.lift(group, manifest_id=str(value.get("manifest_id", "")))
                self._events.rights_changed()
            case "peer.quarantined" | "peer.lifted":
                peers = set(self._access.quarantined.get(group, ()))
                (peers.add if event.type == "peer.quarantined" else peers.discard)(parts[-1])
                self._access.quarantined[group] = frozenset(peers)
                self._events.rights_changed()

    def _revoke(self, group: str, epoch: int, *, user: str = "", manifest_id: str = "") -> None:
        self._access.revocations.add(group, epoch, user=user, manifest_id=manifest_id)
        view = t.RevocationView(group=group, user=user, manifest_id=manifest_id, epoch=epoch)
        self._kept.revocations.setdefault(group, []).append(view)
        self._events.rights_changed()
        self._save()

    def _use_keys(self, views: Iterable[t.SigningKeyView]) -> None:
        keys = []
        for view in views:
            with contextlib.suppress(ValueError):
                raw = base64.urlsafe_b64decode(view.public_key + "=" * (-len(view.public_key) % 4))
                keys.append(VerifyingKey.from_raw(view.key_id, raw, view.valid_until_ms))
        self._access.set_keys(keys)

    def _use_revocations(self, group: str, views: Iterable[t.RevocationView]) -> None:
        self._access.revocations.replace(group, [(each.user, each.manifest_id, each.epoch) for each in views])

    async def _listening(self) -> None:
        """Fetch keys that somebody's token names, and notice when no tracker is heard any more."""
        keys_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._keys_wanted.wait()
            now = time.monotonic()
            if self._keys_wanted.is_set() and now >= keys_at:
                self._keys_wanted.clear()
                keys_at = now + 1.0  # strangers with made-up keys must not make us ask all the time
                with contextlib.suppress(TrackerError):
                    answer = await self._client.list_keys()
                    self._kept.keys = answer.keys
                    self._use_keys(answer.keys)
                    self._save()
            elif self._keys_wanted.is_set():
                await asyncio.sleep(0.1)
            if not self.away and now - self._heartbeat_at > AWAY_SECONDS:
                self.away = True
                self._events.trackers_away()

    def _heard(self) -> None:
        self._heartbeat_at = time.monotonic()
        if self.away:
            self.away = False
            self._events.trackers_back()


def _fact(key: FactKey, held: Held, *, gone: bool = False) -> t.FactBody:
    group, name, manifest_id = key
    return t.FactBody(
        group=group, name=name, manifest_id=manifest_id, pieces=held.pieces, complete=held.complete, gone=gone
    )


def _settle(waiters: list[asyncio.Future[None]], error: TrackerError | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
