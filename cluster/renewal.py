"""Certificates renew themselves before they end.

A node that holds the CA's key signs itself new certificates for the keys it already has, after two
thirds of their life; its name, its key and its place in the membership stay. A node without that key
says in its log, once a day, what ends when. Running TLS contexts take the new certificate for every
connection from then on.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Sequence
from datetime import datetime

from cluster import tls
from cluster.api import certificates
from cluster.api.certificates import CertificateProblem
from cluster.authority import AuthorityError
from cluster.config import NodeConfig
from cluster.joining import load_authority

_log = logging.getLogger("trimaran.renewal")

LOOK_SECONDS = 3600.0
WARN_SECONDS = 86_400.0


def renew_due(config: NodeConfig, now: datetime) -> bool:
    """Renew what is due. True when something was. Raises `AuthorityError` when it is due and cannot be."""
    folder = config.folder
    node_due = tls.renewal_due(certificates.load_certificate(folder.certificate), now)
    peers_due = tls.renewal_due(certificates.load_certificate(folder.peer_authority), now)
    if not node_due and not peers_due:
        return False
    authority = load_authority(folder)
    if node_due:
        request = certificates.make_request(certificates.load_key(folder.key), config.node_id)
        pem = authority.issue_node(request, config.node_id, config.http_hosts, now=now)
        certificates.write_durably(folder.certificate, pem.encode())
    if peers_due:
        request = certificates.make_request(certificates.load_key(folder.peer_authority_key), config.node_id)
        pem = authority.issue_peer_authority(request, config.node_id, now=now)
        certificates.write_durably(folder.peer_authority, pem.encode())
    return True


class Renewal:
    """The rounds of a running node."""

    def __init__(
        self,
        config: NodeConfig,
        contexts: Sequence[ssl.SSLContext],
        renewed: Callable[[], None],
        *,
        now: Callable[[], datetime] = tls.utc_now,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._config = config
        self._contexts = contexts
        self._renewed = renewed
        self._now = now
        self._look_seconds = look_seconds
        self._warned_at: datetime | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._rounds(), name="trimaran renewal")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _rounds(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._look_seconds)

    async def look(self) -> bool:
        """One round. True when certificates were renewed."""
        folder, now = self._config.folder, self._now()
        try:
            if not await asyncio.to_thread(renew_due, self._config, now):
                return False
            for context in self._contexts:
                certificates.load_chain(context, folder.certificate, folder.key)
            self._renewed()
        except (AuthorityError, CertificateProblem, OSError) as error:
            if self._warned_at is None or (now - self._warned_at).total_seconds() >= WARN_SECONDS:
                self._warned_at = now
                _log.warning("this node's certificates are due for renewal and cannot be renewed: %s", error)
            return False
        _log.info("this node's certificates were renewed")
        return True
