"""The nodes' public signing keys, and forgetting what has ended."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from typing import Any

from msgspec.structs import replace

from state_machine import limits
from state_machine.commands import Prune, PutSigningKey, RetireSigningKey
from state_machine.model import SigningKey, State
from state_machine.names import quoted
from state_machine.outcomes import Code

from .draft import Draft

KEY_ID_CHARS_MAX = 128
PUBLIC_KEY_BYTES = 32


def _value(key_id: str, key: SigningKey) -> dict[str, Any]:
    return {
        "key_id": key_id,
        "node_id": key.node_id,
        "public_key": urlsafe_b64encode(key.public_key).rstrip(b"=").decode(),
        "valid_until": key.valid_until_ms,
    }


def put_signing_key(state: State, command: PutSigningKey, draft: Draft) -> Any:
    for field, text in (("key_id", command.key_id), ("node_id", command.node_id)):
        if not 0 < len(text) <= KEY_ID_CHARS_MAX:
            return draft.refuse(Code.INVALID, f"{field} has 1 to {KEY_ID_CHARS_MAX} characters", field)
    if len(command.public_key) != PUBLIC_KEY_BYTES:
        return draft.refuse(Code.INVALID, f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes", "public_key")
    known = state.signing_keys.get(command.key_id)
    if known is not None:
        if known.node_id == command.node_id and known.public_key == command.public_key:
            return None
        return draft.refuse(
            Code.CONFLICT, f"key id {quoted(command.key_id)} already names another key", "key_id"
        )
    if len(state.signing_keys) >= limits.SIGNING_KEYS_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"{limits.SIGNING_KEYS_MAX} signing keys are known already",
            hint="Retire keys that are no longer used.",
        )

    key = SigningKey(command.node_id, command.public_key, command.at_ms)
    state.signing_keys.put(command.key_id, key)
    draft.emit("key.added", f"/keys/{command.key_id}", _value(command.key_id, key))
    return None


def retire_signing_key(state: State, command: RetireSigningKey, draft: Draft) -> Any:
    known = state.signing_keys.get(command.key_id)
    if known is None:
        return draft.refuse(Code.NOT_FOUND, f"there is no signing key {quoted(command.key_id)}", "key_id")
    if known.valid_until_ms == command.valid_until_ms:
        return None
    key = replace(known, valid_until_ms=command.valid_until_ms)
    state.signing_keys.put(command.key_id, key)
    draft.emit("key.retired", f"/keys/{command.key_id}", _value(command.key_id, key))
    return None


def prune(state: State, command: Prune, draft: Draft) -> Any:
    before_ms = command.before_ms
    revocations = [
        (group, key)
        for group, rows in state.revocations.items()
        for key, row in rows.items()
        if row.expires_ms < before_ms
    ]
    sessions = [
        (user, session_id)
        for user, rows in state.revoked_sessions.items()
        for session_id, row in rows.items()
        if row.expires_ms < before_ms
    ]
    invitations = [key for key, row in state.invitations.items() if row.expires_ms < before_ms]
    keys = [
        key_id
        for key_id, row in state.signing_keys.items()
        if row.valid_until_ms is not None and row.valid_until_ms < before_ms
    ]
    for group, key in revocations:
        state.revocations.drop(group, key)
    for user, session_id in sessions:
        state.revoked_sessions.drop(user, session_id)
    for key in invitations:
        state.invitations.drop(key)
    for key_id in keys:
        state.signing_keys.drop(key_id)
    callers = state.requests.prune(before_ms)
    pruned = len(revocations) + len(sessions) + len(invitations) + len(keys)
    if pruned or callers:
        draft.touch()
    return {"pruned": pruned}
