"""What the service needs of the cluster's certificate authority. `cluster/tls.py` fulfils it."""

from __future__ import annotations

from typing import Protocol

from cluster.api import types as t
from cluster.api.certificates import SSLInfo


class AuthorityError(Exception):
    """A request for a certificate, an invite or a joining was refused; nothing happened. `field` names
    what was wrong with the body, "" when it is nothing in it; `denied` when the secret was no good."""

    def __init__(self, message: str, *, field: str = "", denied: bool = False, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.denied = denied
        self.hint = hint


class Authority(Protocol):
    """Certificates for peers and nodes. Methods that take long run their work off the event loop."""

    def operator_of(self, connection: SSLInfo) -> str | None:
        """Which operator is at the other end of a verified connection; None for anyone else."""

    async def certify_peer(self, peer_id: str, csr_pem: str) -> tuple[str, int]:
        """Check that the request is signed by the key that `peer_id` is derived from, and certify it:
        (leaf and intermediate as PEM, end of validity in Unix epoch ms). Raises `AuthorityError`."""

    async def invite_node(self, body: t.InviteBody) -> str:
        """Make a single-use, expiring invite file's content. Raises `AuthorityError`."""

    async def join_node(self, body: t.JoinBody) -> t.JoinAnswer:
        """Check the invite's secret, certify the node, and let it join the membership. Raises
        `AuthorityError`, `MembershipError` or `MembershipUnknownError`."""
