"""Certificates in real handshakes: who is let in, as whom, and who is not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import stat
from datetime import timedelta
from pathlib import Path

import pytest

from cluster import tls
from cluster.api import certificates as certs
from cluster.api.certificates import CertificateProblem
from cluster.tls import ClusterAuthority, PeerAuthority

HANDSHAKE_ERRORS = (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError, OSError)


class Files:
    """A cluster's keys and certificates on disk."""

    def __init__(self, folder: Path, cluster_id: str = "c1") -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.authority = ClusterAuthority.make(cluster_id)
        self.authority.save(self.ca, folder / "ca.key")
        key = certs.new_key()
        self.peer_authority = PeerAuthority(
            certs.parse_certificate(self.authority.issue_peer_authority(certs.make_request(key, "x"), "n1")),
            key,
        )

    def put(self, name: str, pem: str, key: object) -> tuple[Path, Path]:
        certs.write_durably(self.folder / f"{name}.pem", pem.encode())
        certs.write_durably(self.folder / f"{name}.key", certs.key_pem(key), mode=0o600)  # type: ignore[arg-type]
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def node(self, node_id: str, hosts: list[str]) -> tuple[Path, Path]:
        key = certs.new_key()
        return self.put(node_id, self.authority.issue_node(certs.make_request(key, "?"), node_id, hosts), key)

    def operator(self, name: str) -> tuple[Path, Path]:
        key = certs.new_key()
        return self.put(f"op-{name}", self.authority.issue_operator(certs.make_request(key, "?"), name), key)

    def peer(self) -> tuple[str, tuple[Path, Path]]:
        key = certs.new_key()
        peer_id = certs.peer_id_of_key(key.public_key())
        return peer_id, self.put(
            peer_id[:8], self.peer_authority.certify(certs.peer_request(key), peer_id).pem, key
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def meet(
    server: ssl.SSLContext, client: ssl.SSLContext, hostname: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A whole handshake over a real socket, and a byte each way: (as the server sees it, as the client)."""
    arrived: asyncio.Future[ssl.SSLObject] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(1)
            writer.write(b"y")
            await writer.drain()
            if not arrived.done():
                arrived.set_result(writer.get_extra_info("ssl_object"))
        except HANDSHAKE_ERRORS:
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client, server_hostname=hostname
        )
        try:
            writer.write(b"x")
            await asyncio.wait_for(reader.readexactly(1), 5)
            return await asyncio.wait_for(arrived, 5), writer.get_extra_info("ssl_object")
        finally:
            writer.close()


async def test_users_need_the_right_ca_and_host(files: Files, tmp_path: Path) -> None:
    server = tls.https_context(files.ca, *files.node("n1", ["localhost", "127.0.0.1"]))
    await meet(server, certs.tracker_context(files.ca))
    await meet(server, certs.tracker_context(files.ca), hostname="127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        await meet(server, certs.tracker_context(files.ca), hostname="elsewhere.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        await meet(server, certs.tracker_context(Files(tmp_path / "other").ca))
    with pytest.raises(ssl.SSLCertVerificationError):
        await meet(server, certs.tracker_context(None))


async def test_an_operator_is_one_by_certificate_alone(files: Files) -> None:
    server = tls.https_context(files.ca, *files.node("n1", ["localhost"]))
    ca = files.authority.certificate
    seen, _ = await meet(server, certs.tracker_context(files.ca))
    assert tls.operator_of(seen, ca) is None
    seen, _ = await meet(server, certs.tracker_context(files.ca, files.operator("ada")))
    assert tls.operator_of(seen, ca) == "ada"
    assert certs.peer_id_of(seen) is None
    for other in (files.node("n2", ["localhost"]), files.peer()[1]):
        seen, _ = await meet(server, certs.tracker_context(files.ca, other))
        assert tls.operator_of(seen, ca) is None


async def test_a_nodes_peer_authority_cannot_make_operators_nodes_or_hosts(files: Files) -> None:
    """What a stolen intermediate could sign: it must open nothing."""
    from cryptography import x509

    key, ca = certs.new_key(), files.authority.certificate
    server = tls.https_context(files.ca, *files.node("n1", ["localhost"]))
    for uri in (certs.OPERATOR_URI + "eve", certs.NODE_URI + "n1"):
        forged = files.peer_authority._issue(
            key.public_key(),
            "eve",
            names=[x509.UniformResourceIdentifier(uri)],
            usages=(tls._SERVER, tls._CLIENT),
            days=1,
            now=tls.utc_now(),
        )
        pair = files.put("forged", tls._pem(forged) + files.peer_authority.pem, key)
        seen, _ = await meet(server, certs.tracker_context(files.ca, pair))
        assert tls.operator_of(seen, ca) is None
        assert tls.node_of(seen, ca) is None
    for name in (x509.DNSName("localhost"), x509.IPAddress(__import__("ipaddress").ip_address("127.0.0.1"))):
        forged = files.peer_authority._issue(
            key.public_key(), "eve", names=[name], usages=(tls._SERVER,), days=1, now=tls.utc_now()
        )
        pair = files.put("posing", tls._pem(forged) + files.peer_authority.pem, key)
        posing = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        posing.load_cert_chain(*map(str, pair))
        with pytest.raises(ssl.SSLCertVerificationError):
            await meet(posing, certs.tracker_context(files.ca), hostname=str(name.value))


async def test_an_issuer_cannot_lend_a_peers_name(files: Files) -> None:
    from cryptography import x509

    victim, _ = files.peer()
    key = certs.new_key()
    forged = files.peer_authority._issue(
        key.public_key(),
        victim,
        names=[x509.UniformResourceIdentifier(certs.PEER_URI + victim)],
        usages=(tls._SERVER, tls._CLIENT),
        days=1,
        now=tls.utc_now(),
    )
    pair = files.put("forged", tls._pem(forged) + files.peer_authority.pem, key)
    _, mine = files.peer()
    seen, _ = await meet(
        certs.peer_server_context(files.ca, *mine), certs.peer_client_context(files.ca, *pair)
    )
    assert certs.peer_id_of(seen) is None


def test_a_connection_that_was_garbled_after_its_handshake_is_nobodys(files: Files) -> None:
    one, one_files = files.peer()
    two, two_files = files.peer()
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = certs.peer_server_context(files.ca, *one_files).wrap_bio(to_server, to_client, server_side=True)
    client = certs.peer_client_context(files.ca, *two_files).wrap_bio(
        to_client, to_server, server_hostname="localhost"
    )
    unfinished = [client, server]
    while unfinished:
        for side in list(unfinished):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                unfinished.remove(side)
    assert (certs.peer_id_of(server), certs.peer_id_of(client)) == (two, one)
    to_server.write(b"these are no records of TLS")
    with pytest.raises(ssl.SSLError):
        server.read()
    assert certs.peer_id_of(server) is None


async def test_peers_know_each_other(files: Files, tmp_path: Path) -> None:
    one, one_files = files.peer()
    two, two_files = files.peer()
    assert len(one) == 52
    seen, shown = await meet(
        certs.peer_server_context(files.ca, *one_files), certs.peer_client_context(files.ca, *two_files)
    )
    assert (certs.peer_id_of(seen), certs.peer_id_of(shown)) == (two, one)
    other = Files(tmp_path / "other", "c2")
    with pytest.raises(HANDSHAKE_ERRORS):
        await meet(
            certs.peer_server_context(files.ca, *one_files),
            certs.peer_client_context(other.ca, *other.peer()[1]),
        )
    with pytest.raises(HANDSHAKE_ERRORS):
        await meet(certs.peer_server_context(files.ca, *one_files), certs.tracker_context(files.ca))


async def test_nodes_know_each_other(files: Files) -> None:
    one, two = files.node("n1", ["localhost"]), files.node("n2", ["localhost"])
    seen, shown = await meet(tls.raft_server_context(files.ca, *one), tls.raft_client_context(files.ca, *two))
    ca = files.authority.certificate
    fingerprint = certs.key_fingerprint(certs.load_key(two[1]).public_key())
    assert tls.node_of(seen, ca) == ("n2", fingerprint)
    found = tls.node_of(shown, ca)
    assert found is not None
    assert found[0] == "n1"
    # A peer's certificate comes from the same cluster; it is still not a node's.
    seen, _ = await meet(
        tls.raft_server_context(files.ca, *one), tls.raft_client_context(files.ca, *files.peer()[1])
    )
    assert tls.node_of(seen, ca) is None


async def test_an_expired_certificate_is_refused_and_a_renewed_one_serves_at_once(files: Files) -> None:
    key = certs.new_key()
    request = certs.make_request(key, "?")
    long_ago = tls.utc_now() - timedelta(days=tls.NODE_DAYS + 1)
    authority = ClusterAuthority.make("old", now=long_ago)
    authority.save(files.ca, files.folder / "ca.key")
    old = authority.issue_node(request, "n1", ["localhost"], now=long_ago)
    server = tls.https_context(files.ca, *files.put("n1", old, key))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        await meet(server, certs.tracker_context(files.ca))
    certs.load_chain(server, *files.put("n1", authority.issue_node(request, "n1", ["localhost"]), key))
    await meet(server, certs.tracker_context(files.ca))


def test_renewal_is_due_after_two_thirds(files: Files) -> None:
    key, now = certs.new_key(), tls.utc_now()
    pem = files.authority.issue_node(certs.make_request(key, "?"), "n1", ["h"], now=now)
    certificate = certs.parse_certificate(pem)
    assert not tls.renewal_due(certificate, now + timedelta(days=tls.NODE_DAYS * 0.6))
    assert tls.renewal_due(certificate, now + timedelta(days=tls.NODE_DAYS * 0.7))


def test_nothing_outlives_its_issuer(files: Files) -> None:
    late = files.authority.certificate.not_valid_after_utc
    key = certs.new_key()
    pem = files.authority.issue_operator(certs.make_request(key, "?"), "o", now=late - timedelta(days=1))
    assert certs.parse_certificate(pem).not_valid_after_utc == late
    with pytest.raises(CertificateProblem, match="ended"):
        files.authority.issue_operator(certs.make_request(key, "?"), "o", now=late + timedelta(days=1))


def test_a_peer_is_certified_for_its_own_key_only(files: Files) -> None:
    mine, other = certs.new_key(), certs.new_key()
    with pytest.raises(CertificateProblem, match="another peer"):
        files.peer_authority.certify(certs.peer_request(mine), certs.peer_id_of_key(other.public_key()))
    for nonsense in (
        "",
        "x",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    ):
        with pytest.raises(CertificateProblem):
            files.peer_authority.certify(nonsense, certs.peer_id_of_key(mine.public_key()))


def test_requests_must_be_signed_by_their_key_and_be_of_our_kind() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    for key in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        request = (
            x509.CertificateSigningRequestBuilder().subject_name(tls._name("x")).sign(key, hashes.SHA256())
        )
        with pytest.raises(CertificateProblem):
            certs.request_key(request.public_bytes(serialization.Encoding.PEM).decode())
    good = x509.load_pem_x509_csr(certs.make_request(certs.new_key(), "x").encode())
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    with pytest.raises((CertificateProblem, ValueError)):
        tampered = x509.load_der_x509_csr(bytes(der))
        certs.request_key(tampered.public_bytes(serialization.Encoding.PEM).decode())


def test_private_keys_are_for_their_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    key = certs.load_or_make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert certs.spki(certs.load_or_make_key(path).public_key()) == certs.spki(key.public_key())
    assert [file.name for file in path.parent.iterdir()] == ["node.key"]
    path.write_text("garbage")
    with pytest.raises(CertificateProblem, match=r"node\.key"):
        certs.load_key(path)
