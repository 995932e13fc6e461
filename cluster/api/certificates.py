"""Keys and certificates as every party to a cluster sees them: names, identities, peers' TLS contexts.

Owned here: how a key becomes an identity, how private keys lie on disk, certificate requests, and the
contexts of those who *use* certificates (peers among themselves, anyone towards a tracker). Who may *issue*
them is `cluster/tls.py`.

Identities are URIs in the subject alternative name: `trimaran:node:<id>`, `trimaran:operator:<name>`,
`trimaran:peer:<peer_id>`. A `peer_id` is base32 (RFC 4648, lower case, no padding) of the SHA-256 of the
key's SubjectPublicKeyInfo, so it is a property of the key: whoever issued the certificate cannot make a
key answer for another peer's name.
"""

from __future__ import annotations

import base64
import hashlib
import os
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import NameOID

NODE_URI = "trimaran:node:"
OPERATOR_URI = "trimaran:operator:"
PEER_URI = "trimaran:peer:"


class CertificateProblem(Exception):
    """A key, certificate or request is not what it must be; the message says what and where."""


class SSLInfo(Protocol):
    """What `ssl.SSLObject` and `ssl.SSLSocket` share, as far as identities need it."""

    def getpeercert(self, binary_form: bool = ...) -> object: ...


# --- keys ---------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh EC P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def parse_key(data: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateProblem(f"{where} does not hold a private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateProblem(f"{where} holds a key of another kind; an EC key is needed")
    return key


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CertificateProblem(f"cannot read the private key {path}: {error.strerror}") from error
    return parse_key(data, str(path))


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if path.exists():
        return load_key(path)
    key = new_key()
    write_durably(path, key_pem(key), mode=0o600)
    return key


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` at once and for good: written beside, synced, renamed, its folder synced.
    The file never exists with wider rights than `mode`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    with suppress(FileNotFoundError):
        beside.unlink()
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def spki(public_key: PublicKeyTypes) -> bytes:
    return public_key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def key_fingerprint(public_key: PublicKeyTypes) -> str:
    """Hex SHA-256 of the SubjectPublicKeyInfo: how the membership names a node's key."""
    return hashlib.sha256(spki(public_key)).hexdigest()


def peer_id_of_key(public_key: PublicKeyTypes) -> str:
    """52 characters of base32."""
    digest = hashlib.sha256(spki(public_key)).digest()
    return base64.b32encode(digest).decode().rstrip("=").lower()


# --- certificate requests -----------------------------------------------------------------------


def make_request(key: ec.EllipticCurvePrivateKey, common_name: str) -> str:
    """A PEM certificate request. It proves possession of the key; names in it are only wishes."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def peer_request(key: ec.EllipticCurvePrivateKey) -> str:
    """What a peer puts into `PeerBody.csr_pem`."""
    return make_request(key, peer_id_of_key(key.public_key()))


def request_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    """The key of a request whose signature is right. Raises `CertificateProblem`."""
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        genuine = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateProblem("this is not a certificate request in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateProblem("the certificate request is for a key of another kind than EC")
    if not isinstance(key.curve, ec.SECP256R1):
        raise CertificateProblem("the certificate request's key is not on the curve P-256")
    if not genuine:
        raise CertificateProblem("the certificate request is not signed by the key it names")
    return key


# --- certificates -------------------------------------------------------------------------------


def parse_certificate(pem: bytes | str, where: str = "the certificate") -> x509.Certificate:
    """The first certificate of a PEM text."""
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except ValueError as error:
        raise CertificateProblem(f"{where} is not a certificate in PEM: {error}") from error


def load_certificate(path: Path) -> x509.Certificate:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CertificateProblem(f"cannot read the certificate {path}: {error.strerror}") from error
    return parse_certificate(data, str(path))


def uris_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def identity_of(certificate: x509.Certificate, prefix: str) -> str | None:
    """The one identity of that kind that a certificate names; None when it names none, or several."""
    found = [uri[len(prefix) :] for uri in uris_of(certificate) if uri.startswith(prefix)]
    return found[0] if len(found) == 1 else None


def certificate_of(connection: SSLInfo | None) -> x509.Certificate | None:
    """The other side's verified certificate of a TLS connection (`get_extra_info("ssl_object")`); None, too, where the
    connection has broken."""
    if connection is None:
        return None
    try:
        der = connection.getpeercert(True)
    except ValueError:  # what came after the handshake was not TLS: OpenSSL takes the handshake back
        return None
    return x509.load_der_x509_certificate(der) if isinstance(der, bytes) and der else None


def peer_id_of(connection: SSLInfo | None) -> str | None:
    """Which peer is at the other end of a verified connection; None for anyone who is not a peer.

    The name must be the key's own: an issuer cannot lend a peer's name to another key.
    """
    certificate = certificate_of(connection)
    if certificate is None:
        return None
    named = identity_of(certificate, PEER_URI)
    return named if named is not None and named == peer_id_of_key(certificate.public_key()) else None


# --- contexts -----------------------------------------------------------------------------------


def tracker_context(ca: Path | None, client_certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    """For clients of trackers: the certificate must be from `ca` (None: the system's authorities) and be
    for the host that was dialled. `client_certificate` is (certificate, key) of an operator."""
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as error:
        raise CertificateProblem(f"cannot use {ca} as the cluster's CA: {_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if client_certificate is not None:
        load_chain(context, *client_certificate)
    return context


def peer_server_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """For a peer that serves: callers must show a certificate from the cluster. Then ask `peer_id_of`."""
    return mutual_context(ssl.PROTOCOL_TLS_SERVER, ca, certificate, key)


def peer_client_context(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """For a peer that calls another. Hosts are not checked: a peer is its key, so ask `peer_id_of`."""
    return mutual_context(ssl.PROTOCOL_TLS_CLIENT, ca, certificate, key)


def mutual_context(protocol: int, ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """Both sides show certificates of the cluster; who they are is decided after the handshake."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    trust(context, ca)
    load_chain(context, certificate, key)
    return context


def trust(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise CertificateProblem(f"cannot use {ca} as the cluster's CA: {_reason(error)}") from error


def load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Also for renewals: called on a context in use, it counts from the next handshake on."""
    try:
        context.load_cert_chain(str(certificate), str(key))
    except (OSError, ssl.SSLError) as error:
        raise CertificateProblem(
            f"cannot use the certificate {certificate} with the key {key}: {_reason(error)}"
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
