"""Who certifies whom: the cluster's authority, the nodes' authorities for peers, and the nodes' contexts.

    cluster CA (EC P-256, `ca/` in the data folder of a node that may invite)
      ├── node certificate        URI trimaran:node:<id>, the hosts it is dialled at; server and client
      ├── operator certificate    URI trimaran:operator:<name>; client only
      └── a node's peer authority pathlen 0; may name no host, so what it issues can never pose as a tracker
            └── peer certificate  URI trimaran:peer:<peer_id>; server and client; days

Every signature the cluster CA makes names its subject itself: requests only prove possession of a key.
An operator is believed only when the CA itself issued the certificate (`operator_of`), so no node's peer
authority can make one. Left to others: keys, requests and peers' contexts (`cluster/api/certificates.py`),
where files lie (`cluster/config.py`), when things are renewed (`cluster/renewal.py`).
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .api import certificates
from .api.certificates import NODE_URI, OPERATOR_URI, PEER_URI, CertificateProblem, SSLInfo

CA_DAYS = 20 * 365
NODE_DAYS = 365
OPERATOR_DAYS = 5 * 365
PEER_AUTHORITY_DAYS = 365
PEER_DAYS = 7
CLOCK_SKEW = timedelta(hours=1)
"""Certificates are valid from this long before they were made: clocks of other machines may be behind."""
RENEW_AFTER = 2 / 3
"""The part of a certificate's life after which it is renewed."""

_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def utc_now() -> datetime:
    return datetime.now(UTC)


class Authority:
    """A certificate that may issue others, with its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        if certificates.spki(certificate.public_key()) != certificates.spki(key.public_key()):
            raise CertificateProblem("the authority's certificate and key do not belong together")
        self.certificate = certificate
        self.key = key

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        return cls(certificates.load_certificate(certificate), certificates.load_key(key))

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        *,
        names: Sequence[x509.GeneralName],
        usages: Sequence[x509.ObjectIdentifier],
        days: float,
        now: datetime,
        constraints: x509.BasicConstraints | None = None,
        forbidden: x509.NameConstraints | None = None,
    ) -> x509.Certificate:
        authority = constraints is not None
        # No certificate outlives the one that vouches for it.
        until = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        if until <= now:
            raise CertificateProblem(f"the authority's own certificate ended at {until:%Y-%m-%d %H:%M} UTC")
        builder = _builder(common_name, self.certificate.subject, public_key, now - CLOCK_SKEW, until)
        builder = builder.add_extension(
            constraints or x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        builder = builder.add_extension(_key_usage(authority=authority), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(usages)), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if forbidden is not None:
            builder = builder.add_extension(forbidden, critical=True)
        return builder.sign(self.key, hashes.SHA256())


class ClusterAuthority(Authority):
    """The root of a cluster. Whoever holds its key can let nodes in and make operators."""

    @classmethod
    def make(cls, cluster_id: str, *, now: datetime | None = None) -> ClusterAuthority:
        key = certificates.new_key()
        begin = now or utc_now()
        name = f"Trimaran cluster {cluster_id}"
        builder = _builder(
            name, _name(name), key.public_key(), begin - CLOCK_SKEW, begin + timedelta(days=CA_DAYS)
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        builder = builder.add_extension(_key_usage(authority=True), critical=True)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> ClusterAuthority:
        return cls(certificates.load_certificate(certificate), certificates.load_key(key))

    def save(self, certificate: Path, key: Path) -> None:
        certificates.write_durably(key, certificates.key_pem(self.key), mode=0o600)
        certificates.write_durably(certificate, self.pem.encode())

    def issue_node(
        self, request_pem: str, node_id: str, hosts: Sequence[str], *, now: datetime | None = None
    ) -> str:
        """`hosts`: host names and IP addresses at which users and nodes dial this node."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(NODE_URI + node_id)]
        names.extend(_host_name(host) for host in dict.fromkeys(hosts))
        return _pem(
            self._issue(
                certificates.request_key(request_pem),
                f"Trimaran node {node_id}",
                names=names,
                usages=(_SERVER, _CLIENT),
                days=NODE_DAYS,
                now=now or utc_now(),
            )
        )

    def issue_operator(self, request_pem: str, name: str, *, now: datetime | None = None) -> str:
        return _pem(
            self._issue(
                certificates.request_key(request_pem),
                f"Trimaran operator {name}",
                names=[x509.UniformResourceIdentifier(OPERATOR_URI + name)],
                usages=(_CLIENT,),
                days=OPERATOR_DAYS,
                now=now or utc_now(),
            )
        )

    def issue_peer_authority(self, request_pem: str, node_id: str, *, now: datetime | None = None) -> str:
        return _pem(
            self._issue(
                certificates.request_key(request_pem),
                f"Trimaran peers at {node_id}",
                names=[],
                usages=(_SERVER, _CLIENT),
                days=PEER_AUTHORITY_DAYS,
                now=now or utc_now(),
                constraints=x509.BasicConstraints(ca=True, path_length=0),
                forbidden=_NO_HOSTS,
            )
        )


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    pem: str  # leaf, then the node's authority: what a peer presents
    expires_at: datetime


class PeerAuthority(Authority):
    """A node's own authority. It certifies peers and nothing else."""

    @classmethod
    def load(cls, certificate: Path, key: Path) -> PeerAuthority:
        return cls(certificates.load_certificate(certificate), certificates.load_key(key))

    def certify(self, request_pem: str, peer_id: str, *, now: datetime | None = None) -> PeerCertificate:
        """Raises `CertificateProblem` when the request's key is not that peer's."""
        key = certificates.request_key(request_pem)
        if certificates.peer_id_of_key(key) != peer_id:
            raise CertificateProblem("the certificate request is for another peer's key")
        issued = self._issue(
            key,
            peer_id,
            names=[x509.UniformResourceIdentifier(PEER_URI + peer_id)],
            usages=(_SERVER, _CLIENT),
            days=PEER_DAYS,
            now=now or utc_now(),
        )
        return PeerCertificate(_pem(issued) + self.pem, issued.not_valid_after_utc)


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begin + (end - begin) * RENEW_AFTER


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority itself signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def operator_of(connection: SSLInfo | None, authority: x509.Certificate) -> str | None:
    """Which operator is at the other end of a verified connection; None for anyone else.

    The chain was verified by the handshake; a chain may lead through a node's peer authority though, so
    the CA's own signature is asked for.
    """
    certificate = certificates.certificate_of(connection)
    if certificate is None or not issued_by(certificate, authority):
        return None
    return certificates.identity_of(certificate, OPERATOR_URI)


def node_of(connection: SSLInfo | None, authority: x509.Certificate) -> tuple[str, str] | None:
    """(node id, key fingerprint) of the node at the other end; None for anyone who is not a node."""
    certificate = certificates.certificate_of(connection)
    if certificate is None or not issued_by(certificate, authority):
        return None
    node_id = certificates.identity_of(certificate, NODE_URI)
    if node_id is None:
        return None
    return node_id, certificates.key_fingerprint(certificate.public_key())


# --- contexts of a node -------------------------------------------------------------------------


def https_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """For users: no certificate is asked for but an operator's is taken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["http/1.1"])
    certificates.trust(context, ca)
    certificates.load_chain(context, certificate, key)
    return context


def raft_server_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Between nodes: mutual. Who is there is decided by the key (`node_of`) and the membership."""
    return certificates.mutual_context(ssl.PROTOCOL_TLS_SERVER, ca, certificate, key)


def raft_client_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    return certificates.mutual_context(ssl.PROTOCOL_TLS_CLIENT, ca, certificate, key)


# --- building -----------------------------------------------------------------------------------

# Empty and all-covering subtrees match every host: an authority for peers may name none (RFC 5280, 4.2.1.10).
_NO_HOSTS = x509.NameConstraints(
    permitted_subtrees=None,
    excluded_subtrees=[
        x509.DNSName(""),
        x509.IPAddress(ipaddress.ip_network("0.0.0.0/0")),
        x509.IPAddress(ipaddress.ip_network("::/0")),
    ],
)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host.encode("idna").decode() if not host.isascii() else host)


def _builder(
    common_name: str,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(common_name))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
