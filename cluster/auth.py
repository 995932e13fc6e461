"""Who is calling: passwords, sign-in attempts, and sessions.

Owned here: hashing (argon2id, off the event loop, in a bounded queue), limiting failed sign-ins, and
checking sessions on every request. Left to others: the node's signing key (`keys.py`), what a token
looks like (`api/tokens.py`), which sessions were ended (the replicated state).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import Argon2Error, InvalidHashError

from cluster.api import problems as kinds
from cluster.api.tokens import SessionClaims, TokenError, TokenFault, verify_session
from cluster.keys import KeyRing
from cluster.problems import ProblemError
from cluster.settings import ServiceSettings
from state_machine.machine import StateMachine
from state_machine.model import SigningKey

_R = TypeVar("_R")
_SESSIONS_CACHED_MAX: Final = 20_000
_WINDOWS_MAX: Final = 100_000


def new_invitation() -> tuple[str, str]:
    """A code for whoever is invited, and its hash for the replicated state."""
    code = secrets.token_urlsafe(24)
    return code, invitation_hash(code)


def invitation_hash(code: str) -> str:
    """The code has 192 random bits: a fast hash is enough, there is nothing to guess."""
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()


class PerhapsBehindError(ProblemError):
    """A genuine session may be news to this node: it was just started, or another node answered a moment
    ago. Only what is current sends anyone away: ask again after a barrier."""


class Passwords:
    """Hashes and verifies in few threads, with a bounded queue: argon2id is meant to be slow."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._hasher = PasswordHasher(
            time_cost=settings.hash_passes,
            memory_cost=settings.hash_memory_kib,
            parallelism=1,
            hash_len=32,
            type=Type.ID,
        )
        self._executor = ThreadPoolExecutor(settings.hash_threads, thread_name_prefix="argon2id")
        self._waiting_max = settings.hash_queue_max
        self._waiting = 0
        # Verified in place of an unknown user's hash, so that both take the same time.
        self._nobody = self._hasher.hash(secrets.token_urlsafe(16))

    async def hash(self, password: str, *, user: str, request_id: str) -> str:
        """The password's PHC string. The salt follows from the request id, whose 74 random bits make it
        unique: a retry on any node then carries the same hash, and so the same request hash."""
        salt = hashlib.sha256(f"trimaran password\0{request_id}\0{user}".encode("utf-8", "surrogatepass"))
        return await self._run(lambda: self._hasher.hash(password, salt=salt.digest()[:16]))

    async def verify(self, password: str, password_hash: str | None) -> bool:
        """Whether it is the password; None (no such user) takes as long, and is False."""
        known = password_hash is not None

        def work() -> bool:
            try:
                return self._hasher.verify(password_hash or self._nobody, password) and known
            except (Argon2Error, InvalidHashError):
                return False

        return await self._run(work)

    async def _run(self, work: Callable[[], _R]) -> _R:
        if self._waiting >= self._waiting_max:
            raise ProblemError(
                kinds.OVERLOADED,
                "Too many sign-ins and registrations are waiting; nothing was done.",
                retry_after_seconds=1.0,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class Attempts:
    """Failed sign-ins, counted in fixed windows on the monotonic clock, per account with address and per
    address alone. In memory of this node: limits are a brake, not a fact."""

    def __init__(self, settings: ServiceSettings, monotonic: Callable[[], float]) -> None:
        self._account_max = settings.attempts_per_account
        self._address_max = settings.attempts_per_address
        self._window_seconds = settings.attempts_seconds
        self._monotonic = monotonic
        self._windows: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def begin(self, account: str, address: str) -> None:
        """Count an attempt as failed until `succeeded` says otherwise, so that attempts in parallel
        are counted too. Raises `ProblemError` when there were too many."""
        now = self._monotonic()
        for key, most in (((account, address), self._account_max), (("", address), self._address_max)):
            started, count = self._windows.get(key, (now, 0))
            if count >= most and now < started + self._window_seconds:
                raise ProblemError(
                    kinds.RATE_LIMITED,
                    "Too many failed sign-ins; this one was not tried.",
                    retry_after_seconds=started + self._window_seconds - now,
                )
        for key in ((account, address), ("", address)):
            started, count = self._windows.pop(key, (now, 0))
            if now >= started + self._window_seconds:
                started, count = now, 0
            self._windows[key] = (started, count + 1)
        while len(self._windows) > _WINDOWS_MAX:
            self._windows.popitem(last=False)

    def succeeded(self, account: str, address: str) -> None:
        self._windows.pop((account, address), None)
        started, count = self._windows.get(("", address), (0.0, 0))
        if count > 1:
            self._windows["", address] = (started, count - 1)
        else:
            self._windows.pop(("", address), None)


class Sessions:
    """Checks the bearer session of a request. Signatures are verified once and remembered; whether the
    session was ended is asked of the state each time."""

    def __init__(
        self,
        machine: StateMachine,
        keys: KeyRing,
        settings: ServiceSettings,
        wall_ms: Callable[[], int],
    ) -> None:
        self._machine = machine
        self._keys = keys
        self._wall_ms = wall_ms
        self._skew_ms = round(settings.skew_seconds * 1000)
        self._verified: dict[str, tuple[SessionClaims, SigningKey | None]] = {}

    def check(self, authorization: str | None) -> SessionClaims:
        """Raises `ProblemError` unless it is a session that lives."""
        claims = self.read(authorization)
        if not self.lives(claims):
            said = "The session was ended, by signing out or by a change of password."
            user = self._machine.state.users.get(claims.user)
            if user is None or user.session_epoch < claims.epoch:
                raise PerhapsBehindError(kinds.UNAUTHENTICATED, said)
            raise unauthenticated(said)
        return claims

    def read(self, authorization: str | None) -> SessionClaims:
        """The claims of a genuine, unexpired session that may have been ended. Raises `ProblemError`."""
        if authorization is None:
            raise unauthenticated("The request carries no session.")
        scheme, _, token = authorization.partition(" ")
        if scheme != "Bearer" and scheme.lower() != "bearer":
            raise unauthenticated("The request carries no bearer session.")
        known = self._verified.get(token)
        now_ms = self._wall_ms()
        if known is not None:
            claims, key = known
            if (
                now_ms < claims.expires_at_ms
                and key is not None
                and self._machine.state.signing_keys.get(claims.key_id) is key
                and (key.valid_until_ms is None or now_ms < key.valid_until_ms)
            ):
                return claims
            del self._verified[token]
        try:
            claims = verify_session(token, self._keys, now_ms, skew_ms=self._skew_ms)
        except TokenError as error:
            said = _SAID.get(error.fault, "The session is not valid.")
            if error.fault is TokenFault.KEY_UNKNOWN:
                raise PerhapsBehindError(kinds.UNAUTHENTICATED, said) from None
            raise unauthenticated(said) from None
        if len(self._verified) >= _SESSIONS_CACHED_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = (claims, self._machine.state.signing_keys.get(claims.key_id))
        return claims

    def lives(self, claims: SessionClaims) -> bool:
        """Whether the user is still there, and neither signed out nor changed the password since."""
        state = self._machine.state
        user = state.users.get(claims.user)
        return (
            user is not None
            and user.session_epoch == claims.epoch
            and state.revoked_sessions.get(claims.user, claims.session_id) is None
        )


_SAID: Final[dict[Any, str]] = {
    TokenFault.EXPIRED: "The session has expired.",
    TokenFault.KEY_RETIRED: "The session was signed with a key that is no longer in use.",
    TokenFault.KEY_UNKNOWN: "The session was signed with a key that this node does not know.",
    TokenFault.NOT_YET: "The session was issued in the future; the clocks of the nodes differ too much.",
}


def unauthenticated(detail: str) -> ProblemError:
    return ProblemError(kinds.UNAUTHENTICATED, detail)
