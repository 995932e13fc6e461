"""Who this peer is: its key, its certificate, and who is signed in on it.

Owned here: these three files of the home, and the TLS contexts made of them (reloaded when a certificate is renewed;
connections that stand keep theirs). Left to others: what a certificate is (`cluster.api.certificates`), getting one
(`tracker_agent.py`).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from cluster.api import certificates

from .home import Home, write_whole
from .reports import Exit, TrimaranError

ContextMaker: TypeAlias = Callable[[Path, Path, Path], ssl.SSLContext]
RENEW_AT_SHARE = 0.5  # of a certificate's life


class SignIn(Struct, frozen=True):
    """Who is signed in: `session.json`."""

    user: str
    session: str
    expires_at: str = ""


class Identity:
    """Raises TrimaranError when the home's key cannot be read."""

    def __init__(self, home: Home, ca: Path | None, *, insecure: bool) -> None:
        self._home = home
        self._ca = ca
        self.insecure = insecure
        try:
            self.key = certificates.load_or_make_key(home.key_file)
        except certificates.CertificateProblem as problem:
            raise TrimaranError(
                f"{problem}.",
                exit_code=Exit.USAGE,
                code="bad-key",
                hint="Use another home, or restore the file.",
            ) from problem
        self.peer_id = certificates.peer_id_of_key(self.key.public_key())
        self.sign_in = self._read_sign_in()
        self._server: ssl.SSLContext | None = None
        self._client: ssl.SSLContext | None = None

    # --- signed in ------------------------------------------------------------------------------

    def _read_sign_in(self) -> SignIn | None:
        try:
            return msgspec.json.decode(self._home.session_file.read_bytes(), type=SignIn)
        except (OSError, msgspec.DecodeError):
            return None

    def signed_in(self, sign_in: SignIn | None) -> None:
        """Somebody signed in, or out. Blocks for a sync."""
        self.sign_in = sign_in
        if sign_in is None:
            self._home.session_file.unlink(missing_ok=True)
        else:
            write_whole(self._home.session_file, msgspec.json.encode(sign_in), mode=0o600)

    # --- certificate ----------------------------------------------------------------------------

    def request_pem(self) -> str:
        return "" if self.insecure else certificates.peer_request(self.key)

    @property
    def certified(self) -> bool:
        """There is a certificate whose time is not over (or none is needed)."""
        return self.insecure or self.certificate_seconds() > 0

    def certificate_seconds(self) -> float:
        """How long the certificate counts yet; 0 or less when there is none that does."""
        try:
            found = certificates.load_certificate(self._home.certificate_file)
        except certificates.CertificateProblem:
            return 0.0
        if certificates.identity_of(found, certificates.PEER_URI) != self.peer_id:
            return 0.0
        return (found.not_valid_after_utc - datetime.now(UTC)).total_seconds()

    def renew_in_seconds(self) -> float:
        """When to ask for a new certificate; 0: now."""
        if self.insecure:
            return float("inf")
        try:
            found = certificates.load_certificate(self._home.certificate_file)
        except certificates.CertificateProblem:
            return 0.0
        life = (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds()
        return max(0.0, self.certificate_seconds() - life * (1 - RENEW_AT_SHARE))

    def certify(self, certificate_pem: str) -> None:
        """Keep a certificate that a tracker made, and use it from the next handshake on. Blocks."""
        if self.insecure or not certificate_pem:
            return
        write_whole(self._home.certificate_file, certificate_pem.encode(), mode=0o644)
        for context in (self._server, self._client):
            if context is not None:
                certificates.load_chain(context, self._home.certificate_file, self._home.key_file)

    # --- contexts -------------------------------------------------------------------------------

    def server_context(self) -> ssl.SSLContext | None:
        """None where TLS is off. Raises TrimaranError without a certificate."""
        if self.insecure:
            return None
        if self._server is None:
            self._server = self._context(certificates.peer_server_context)
        return self._server

    def client_context(self) -> ssl.SSLContext:
        if self._client is None:
            self._client = self._context(certificates.peer_client_context)
        return self._client

    def _context(self, make: ContextMaker) -> ssl.SSLContext:
        if self._ca is None:
            raise TrimaranError(
                "The cluster's CA is not known, so other peers cannot be trusted.",
                exit_code=Exit.USAGE,
                code="no-ca",
                hint="Name its file with --ca or TRIMARAN_CA.",
            )
        try:
            return make(self._ca, self._home.certificate_file, self._home.key_file)
        except certificates.CertificateProblem as problem:
            raise TrimaranError(
                f"{problem}.",
                exit_code=Exit.DENIED,
                code="no-certificate",
                hint="Sign in again while a tracker answers: trimaran login USER",
            ) from problem
