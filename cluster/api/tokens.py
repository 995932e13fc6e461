"""The right to a group's pieces, as a signed statement: made by trackers, verified offline by peers.

Owned here: the token's form (a JWT, RFC 7519, signed with EdDSA over Ed25519, RFC 8037), its
verification, and what a revocation covers. Left to others: keeping keys and revocations up to date
(peers: the watch; trackers: the replicated state).

A token says: until `exp`, the peer `peer_id` (whose TLS key proves that name) may fetch pieces of the
files of `group`, because `user` has been a member since revision `epoch`. Every withdrawal is a
`Revocation` with the revision at which it happened; tokens with a lower epoch are void.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal, TypeVar

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

ALGORITHM = "EdDSA"
TOKEN_CHARS_MAX = 2_048
SKEW_MS = 60_000

_P = TypeVar("_P")


class TokenFault(StrEnum):
    MALFORMED = "malformed"
    ALGORITHM = "algorithm"  # not EdDSA: "none", HMAC with the public key, ...
    KEY_UNKNOWN = "key_unknown"  # perhaps newer than what is known here: fetch the keys again
    KEY_RETIRED = "key_retired"
    SIGNATURE = "signature"
    PURPOSE = "purpose"  # a session where a token is needed, or the reverse
    EXPIRED = "expired"
    NOT_YET = "not_yet"  # issued in the future, beyond the allowed skew
    OTHER_PEER = "other_peer"
    OTHER_GROUP = "other_group"


class TokenError(Exception):
    """A token was refused. `fault` says why; the message is for people and holds nothing of the token."""

    def __init__(self, fault: TokenFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class VerifyingKey(Struct, frozen=True):
    """A node's public key. Signatures made with a retired key count until `valid_until_ms`."""

    key_id: str
    public_key: Ed25519PublicKey
    valid_until_ms: int | None = None

    @classmethod
    def from_raw(cls, key_id: str, raw: bytes, valid_until_ms: int | None = None) -> VerifyingKey:
        """From 32 raw bytes. Raises `ValueError` when they are no key."""
        try:
            return cls(key_id, Ed25519PublicKey.from_public_bytes(raw), valid_until_ms)
        except UnsupportedAlgorithm as error:  # pragma: no cover - a build of OpenSSL without Ed25519
            raise ValueError("this machine's OpenSSL has no Ed25519") from error


class Claims(Struct, frozen=True, kw_only=True):
    """What a piece token says."""

    user: str
    peer_id: str
    group: str
    epoch: int
    issued_at_ms: int
    expires_at_ms: int
    key_id: str = ""


class SessionClaims(Struct, frozen=True, kw_only=True):
    """What a session says. `epoch` is the user's session epoch: a change of password raises it."""

    user: str
    session_id: str
    epoch: int
    issued_at_ms: int
    expires_at_ms: int
    key_id: str = ""


class _TokenPayload(Struct, frozen=True):
    aud: Literal["pieces"]
    sub: str
    peer: str
    group: str
    epoch: int
    iat: int
    exp: int


class _SessionPayload(Struct, frozen=True):
    aud: Literal["session"]
    sub: str
    sid: str
    epoch: int
    iat: int
    exp: int


def sign_token(claims: Claims, key: Ed25519PrivateKey, key_id: str) -> str:
    """Times are rounded to whole seconds, the expiry down."""
    payload = {
        "aud": "pieces",
        "sub": claims.user,
        "peer": claims.peer_id,
        "group": claims.group,
        "epoch": claims.epoch,
        "iat": claims.issued_at_ms // 1000,
        "exp": claims.expires_at_ms // 1000,
    }
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"kid": key_id})


def sign_session(claims: SessionClaims, key: Ed25519PrivateKey, key_id: str) -> str:
    payload = {
        "aud": "session",
        "sub": claims.user,
        "sid": claims.session_id,
        "epoch": claims.epoch,
        "iat": claims.issued_at_ms // 1000,
        "exp": claims.expires_at_ms // 1000,
    }
    return jwt.encode(payload, key, algorithm=ALGORITHM, headers={"kid": key_id})


def verify_token(
    token: str,
    keys: Mapping[str, VerifyingKey],
    now_ms: int,
    *,
    skew_ms: int = SKEW_MS,
    peer_id: str | None = None,
    group: str | None = None,
) -> Claims:
    """Check form, algorithm, key, signature, purpose and time; and, when given, that it was issued to
    `peer_id` (whom TLS has proved) for `group`. Raises `TokenError`. Revocations are the caller's
    (`Revocations.covers`)."""
    key_id, decoded = _verify(token, keys, now_ms)
    payload = _convert(decoded, _TokenPayload)
    _check_times(payload.iat, payload.exp, now_ms, skew_ms)
    if peer_id is not None and payload.peer != peer_id:
        raise TokenError(TokenFault.OTHER_PEER, "the token was issued to another peer")
    if group is not None and payload.group != group:
        raise TokenError(TokenFault.OTHER_GROUP, "the token is for another group")
    return Claims(
        user=payload.sub,
        peer_id=payload.peer,
        group=payload.group,
        epoch=payload.epoch,
        issued_at_ms=payload.iat * 1000,
        expires_at_ms=payload.exp * 1000,
        key_id=key_id,
    )


def verify_session(
    token: str, keys: Mapping[str, VerifyingKey], now_ms: int, *, skew_ms: int = SKEW_MS
) -> SessionClaims:
    """The same for a session. Raises `TokenError`."""
    key_id, decoded = _verify(token, keys, now_ms)
    payload = _convert(decoded, _SessionPayload)
    _check_times(payload.iat, payload.exp, now_ms, skew_ms)
    return SessionClaims(
        user=payload.sub,
        session_id=payload.sid,
        epoch=payload.epoch,
        issued_at_ms=payload.iat * 1000,
        expires_at_ms=payload.exp * 1000,
        key_id=key_id,
    )


def _verify(token: str, keys: Mapping[str, VerifyingKey], now_ms: int) -> tuple[str, dict[str, Any]]:
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        raise TokenError(TokenFault.MALFORMED, "not a token")
    try:
        header = _header(token.partition(".")[0])
    except jwt.PyJWTError as error:
        raise TokenError(TokenFault.MALFORMED, "not a token") from error
    # The header is the sender's word: the algorithm is ours alone, whatever it says (RFC 8725, 3.1).
    if header.get("alg") != ALGORITHM:
        raise TokenError(TokenFault.ALGORITHM, "the token is not signed with EdDSA")
    key_id = header.get("kid")
    key = keys.get(key_id) if isinstance(key_id, str) else None
    if key is None or not isinstance(key_id, str):
        raise TokenError(TokenFault.KEY_UNKNOWN, "the token is signed with a key that is not known here")
    if key.valid_until_ms is not None and now_ms >= key.valid_until_ms:
        raise TokenError(TokenFault.KEY_RETIRED, "the token is signed with a retired key")
    try:
        decoded: dict[str, Any] = jwt.decode(
            token,
            key.public_key,
            algorithms=[ALGORITHM],
            # The payload's own checks are ours: one clock, one skew, precise errors.
            options={
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "verify_aud": False,
                "verify_iss": False,
                "verify_sub": False,
                "verify_jti": False,
            },
        )
    except jwt.InvalidSignatureError as error:
        raise TokenError(TokenFault.SIGNATURE, "the token's signature is wrong") from error
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise TokenError(TokenFault.MALFORMED, "not a token") from error
    return key_id, decoded


@lru_cache(maxsize=256)
def _header(segment: str) -> dict[str, Any]:
    """What a token's first part says. All tokens of a key have the same, and a peer in a crowd is shown hundreds."""
    return jwt.get_unverified_header(f"{segment}.e30.")


def _convert(decoded: dict[str, Any], payload: type[_P]) -> _P:
    try:
        return msgspec.convert(decoded, payload, strict=True)
    except msgspec.ValidationError as error:
        fault = TokenFault.PURPOSE if error.args[0].endswith("`$.aud`") else TokenFault.MALFORMED
        raise TokenError(fault, "the token is not meant for this") from error


def _check_times(issued_at: int, expires_at: int, now_ms: int, skew_ms: int) -> None:
    # No grace after the end: "not beyond" is what a withdrawn right rests on. Skew counts only against
    # tokens from the future.
    if now_ms >= expires_at * 1000:
        raise TokenError(TokenFault.EXPIRED, "the token has expired")
    if issued_at * 1000 > now_ms + skew_ms:
        raise TokenError(TokenFault.NOT_YET, "the token was issued in the future")


class Revocations:
    """The withdrawals a peer knows, by what they cover. Tokens older than one are void: all of a
    group's (user and manifest empty), one user's, or for one version of one file."""

    def __init__(self) -> None:
        self._epochs: dict[tuple[str, str, str], int] = {}

    def __len__(self) -> int:
        return len(self._epochs)

    def add(self, group: str, epoch: int, *, user: str = "", manifest_id: str = "") -> None:
        """Idempotent, and in any order: the highest epoch counts."""
        key = (group, user, manifest_id)
        if epoch > self._epochs.get(key, -1):
            self._epochs[key] = epoch

    def replace(self, group: str, revocations: Iterable[tuple[str, str, int]]) -> None:
        """Put what a tracker listed for `group` as (user, manifest_id, epoch) in the place of what was known."""
        for key in [key for key in self._epochs if key[0] == group]:
            del self._epochs[key]
        for user, manifest_id, epoch in revocations:
            self.add(group, epoch, user=user, manifest_id=manifest_id)

    def lift(self, group: str, *, manifest_id: str) -> None:
        """The version was published again: tokens for it count again."""
        self._epochs.pop((group, "", manifest_id), None)

    def covers(self, claims: Claims, manifest_id: str = "") -> bool:
        """Whether something withdrawn since makes these claims void (for this version of a file)."""
        epochs, group = self._epochs, claims.group
        return (
            claims.epoch < epochs.get((group, "", ""), -1)
            or claims.epoch < epochs.get((group, claims.user, ""), -1)
            or (bool(manifest_id) and claims.epoch < epochs.get((group, "", manifest_id), -1))
        )
