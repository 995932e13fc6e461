"""Who may have a piece: tokens checked offline, against the keys and withdrawals this peer knows.

Owned here: the decision. Left to others: keeping keys and revocations up to date (`tracker_agent.py`),
what is offered to which group (`swarm.py`), cutting transfers that run when something is withdrawn (`server.py`).
A token counts until it expires and not beyond, with or without trackers.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from cluster.api.tokens import Claims, Revocations, TokenError, TokenFault, VerifyingKey, verify_token

_KNOWN_TOKENS_MAX = 4096


class AccessRefusedError(Exception):
    """401: no token that counts. 403: a genuine one, but not for this peer, or withdrawn."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Access:
    """Keys and revocations of the cluster, as far as this peer knows them. Belongs to the event loop."""

    def __init__(self, *, wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self.keys: dict[str, VerifyingKey] = {}
        self.revocations = Revocations()
        self.quarantined: dict[str, frozenset[str]] = {}  # group -> peer ids
        self.key_wanted: Callable[[], None] = lambda: None  # a genuine-looking token names a key we lack
        self._wall_ms = wall_ms
        self._known: OrderedDict[str, Claims] = OrderedDict()  # by token

    def set_keys(self, keys: Iterable[VerifyingKey]) -> None:
        self.keys = {key.key_id: key for key in keys}
        self._known.clear()

    def check(self, token: str | None, peer_id: str | None, group: str | None = None) -> Claims:
        """The claims of a token that counts now, shown by the peer that TLS proved (None: without TLS, where
        the token alone speaks). Raises AccessRefusedError. `allows` decides about one version of a file."""
        if not token:
            raise AccessRefusedError(401, "no-token", "A token for the group is needed.")
        now_ms = self._wall_ms()
        claims = self._known.get(token)
        if claims is None:
            try:
                claims = verify_token(token, self.keys, now_ms)
            except TokenError as error:
                if error.fault is TokenFault.KEY_UNKNOWN:
                    self.key_wanted()
                raise AccessRefusedError(401, f"token-{error.fault.value}", str(error)) from error
            self._known[token] = claims
            if len(self._known) > _KNOWN_TOKENS_MAX:
                self._known.popitem(last=False)
        key = self.keys.get(claims.key_id)
        if claims.expires_at_ms <= now_ms or key is None or not _counts(key, now_ms):
            raise AccessRefusedError(401, "token-expired", "The token has expired.")
        if peer_id is not None and claims.peer_id != peer_id:
            raise AccessRefusedError(403, "token-other_peer", "The token was issued to another peer.")
        if group is not None and claims.group != group:
            raise AccessRefusedError(403, "token-other_group", "The token is for another group.")
        if not self.allows(claims):
            raise AccessRefusedError(403, "withdrawn", "The right was withdrawn.")
        return claims

    def allows(self, claims: Claims, manifest_id: str = "") -> bool:
        """Whether claims checked before still stand (for this version of a file)."""
        return (
            claims.expires_at_ms > self._wall_ms()
            and not self.revocations.covers(claims, manifest_id)
            and not self.in_quarantine(claims.group, claims.peer_id)
        )

    def in_quarantine(self, group: str, peer_id: str) -> bool:
        return peer_id in self.quarantined.get(group, ())

    def seconds_left(self, claims: Claims) -> float:
        """Until the claims end by themselves; 0 when they have."""
        return max(0.0, (claims.expires_at_ms - self._wall_ms()) / 1000)


def _counts(key: VerifyingKey, now_ms: int) -> bool:
    return key.valid_until_ms is None or now_ms < key.valid_until_ms
