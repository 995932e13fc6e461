"""Signing keys: this node's private ones on its disk, everyone's public ones from the replicated state.

Owned here: making, keeping, announcing and rotating this node's Ed25519 keys, and the ring with which
all nodes verify. A private key never leaves the folder it was made in: it is in no log, snapshot or
answer. Left to others: what is signed (`api/tokens.py`).

Rotation: the new key is announced first, and signs only after `OVERLAP_SECONDS`, when every node and
every watching peer knows it. Then the old one is retired: what it signed counts until the longest-lived
session it signed has ended.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from cluster.api.tokens import Claims, SessionClaims, VerifyingKey, sign_session, sign_token
from cluster.settings import ServiceSettings
from state_machine.commands import AnyCommand, PutSigningKey, RetireSigningKey
from state_machine.machine import StateMachine
from state_machine.model import SigningKey

log = structlog.get_logger("cluster.keys")

OVERLAP_SECONDS: Final = 60.0

Propose = Callable[[AnyCommand], Awaitable[bool]]  # whether it took effect


class KeyRing(Mapping[str, VerifyingKey]):
    """The replicated public keys, parsed once each. Always as new as the state."""

    def __init__(self, machine: StateMachine) -> None:
        self._machine = machine
        self._parsed: dict[str, tuple[SigningKey, VerifyingKey]] = {}

    def __getitem__(self, key_id: str) -> VerifyingKey:
        row = self._machine.state.signing_keys.get(key_id)
        known = self._parsed.get(key_id)
        if row is None:
            if known is not None:
                del self._parsed[key_id]
            raise KeyError(key_id)
        if known is not None and known[0] is row:
            return known[1]
        key = VerifyingKey.from_raw(key_id, row.public_key, row.valid_until_ms)
        self._parsed[key_id] = (row, key)
        return key

    def __iter__(self) -> Iterator[str]:
        return (key_id for key_id, _ in self._machine.state.signing_keys.items())

    def __len__(self) -> int:
        return len(self._machine.state.signing_keys)


class NodeKeys:
    """This node's own keys. `ready` once one of them is known to the cluster."""

    def __init__(
        self,
        machine: StateMachine,
        settings: ServiceSettings,
        node_id: str,
        propose: Propose,
        wall_ms: Callable[[], int],
    ) -> None:
        self._machine = machine
        self._settings = settings
        self._node_id = node_id
        self._propose = propose
        self._wall_ms = wall_ms
        self._folder = settings.data_dir / "signing"
        self._private: dict[str, Ed25519PrivateKey] = {}
        self._current = ""

    @property
    def ready(self) -> bool:
        return bool(self._current)

    @property
    def key_id(self) -> str:
        return self._current

    def sign_session(self, claims: SessionClaims) -> str:
        return sign_session(claims, self._private[self._current], self._current)

    def sign_token(self, claims: Claims) -> str:
        return sign_token(claims, self._private[self._current], self._current)

    def load(self) -> None:
        """Read the keys on disk, or make the first. Raises `OSError`."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("*.key")):
            self._private[path.stem] = Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        if not self._private:
            self._make()

    async def tend(self) -> None:
        """One round of care; called every few seconds. Puts what the cluster does not know yet, takes
        the newest key that is known, makes a new one when that is old, retires the others."""
        now_ms = self._wall_ms()
        known = self._machine.state.signing_keys
        for key_id, private in list(self._private.items()):
            if known.get(key_id) is None:
                public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
                if not await self._propose(PutSigningKey(key_id, self._node_id, public, now_ms)):
                    return
        rows = {
            key_id: row
            for key_id in self._private
            if (row := known.get(key_id)) is not None and row.valid_until_ms is None
        }
        if not rows:
            # All of ours are retired (an operator's doing, or we were removed and came back).
            self._current = ""
            self._make()
            return
        newest = max(rows, key=lambda key_id: (rows[key_id].added_ms, key_id))
        settled = now_ms - rows[newest].added_ms >= min(
            OVERLAP_SECONDS * 1000, self._settings.signing_key_seconds * 500
        )
        if self._current not in rows or (settled and newest != self._current):
            self._current = newest
        if settled and newest == self._current:
            await self._retire_others(now_ms)
            if now_ms - rows[newest].added_ms >= self._settings.signing_key_seconds * 1000:
                self._make()

    async def _retire_others(self, now_ms: int) -> None:
        until_ms = now_ms + round((self._settings.session_seconds + self._settings.skew_seconds) * 1000)
        for key_id, row in list(self._machine.state.signing_keys.items()):
            if row.node_id != self._node_id or key_id == self._current:
                continue
            if row.valid_until_ms is None and not await self._propose(RetireSigningKey(key_id, until_ms)):
                return
            if self._private.pop(key_id, None) is not None:
                self._path(key_id).unlink(missing_ok=True)

    def _make(self) -> None:
        key_id = f"{self._node_id}-{secrets.token_hex(6)}"
        private = Ed25519PrivateKey.generate()
        raw = private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        path = self._path(key_id)
        beside = path.with_suffix(".new")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, raw)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        beside.rename(path)
        self._private[key_id] = private
        log.info("made a signing key", key_id=key_id)

    def _path(self, key_id: str) -> Path:
        return self._folder / f"{key_id}.key"
