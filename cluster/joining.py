"""How a node comes into a cluster: invites, joinings, and the certificates a running node gives.

Owned here: `NodeAuthority` (what the service asks of certificates), the invite's form and its record on
the inviter's disk. Left to others: signing itself (`tls.py`), what the joining side does (`founding.py`).

An invite is a secret of 256 bits with the place to use it, the CA to expect there, and the new node's
id and address. The inviter keeps only the secret's SHA-256, so its disk holds nothing that lets anyone
in. An invite admits one key: used again with the same key it gives the same answer (the first one may
have been lost on the way), with another it is refused.

Joining certifies the node and tells it who is there. It becomes part of the membership once it runs:
the inviter looks until the node, by its key, answers at its Raft address, and only then adds it, so that a mistyped
address or a machine that is never started leaves nothing half done in the cluster.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.x509 import Certificate

from cluster import tls
from cluster.api import certificates
from cluster.api import types as t
from cluster.api.certificates import CertificateProblem, SSLInfo
from cluster.authority import AuthorityError
from cluster.config import (
    ConfigError,
    DataFolder,
    certificate_hosts,
    host_port,
    http_url,
)
from cluster.consensus import Consensus, MembershipError, NodeInfo

_log = logging.getLogger("trimaran.joining")

INVITE_PREFIX = "trimaran-invite-1."
INVITE_SECONDS_MAX = 30 * 86_400
FORGET_SECONDS = 7 * 86_400
LOOK_SECONDS = 1.0
REACH_SECONDS = 2.0
ADD_SECONDS = 10.0  # then anew: an answer may have been lost with a connection


class Invite(msgspec.Struct, frozen=True, kw_only=True):
    """What the invite file holds."""

    node_id: str
    raft: str
    cluster_id: str
    inviter: str  # URL of the node that will know the secret
    ca_pem: str
    secret: str
    expires_at_ms: int

    def encode(self) -> str:
        body = msgspec.json.encode(self)
        check = hashlib.sha256(body).digest()[:4]
        return INVITE_PREFIX + base64.urlsafe_b64encode(check + body).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Invite:
        """Raises `AuthorityError` for what is not a whole invite."""
        stripped = "".join(text.split())
        if not stripped.startswith(INVITE_PREFIX):
            raise AuthorityError("this is not an invite made by `trimaran tracker invite`", field="join")
        coded = stripped.removeprefix(INVITE_PREFIX)
        try:
            data = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
            if hashlib.sha256(data[4:]).digest()[:4] != data[:4]:
                raise AuthorityError("the invite is damaged: copy it again, whole", field="join")
            return msgspec.json.decode(data[4:], type=cls)
        except (ValueError, msgspec.MsgspecError) as error:
            raise AuthorityError("the invite is damaged: copy it again, whole", field="join") from error


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the inviter keeps, in a file named by the secret's hash."""

    node_id: str
    raft: str
    expires_at_ms: int
    http: str = ""
    key_fingerprint: str = ""  # of the node that used it
    admitted: bool = False


class Invitations:
    """The invites made on this node. Blocking; small files."""

    def __init__(self, folder: Path, wall_ms: Callable[[], int]) -> None:
        self._folder = folder
        self._wall_ms = wall_ms

    def make(self, node_id: str, raft: str, valid_seconds: int) -> tuple[str, int]:
        """(secret, end of validity)."""
        self._forget()
        secret = secrets.token_urlsafe(32)
        expires_at_ms = self._wall_ms() + valid_seconds * 1000
        self._write(_hashed(secret), _Record(node_id=node_id, raft=raft, expires_at_ms=expires_at_ms))
        return secret, expires_at_ms

    def use(self, body: t.JoinBody, key_fingerprint: str) -> None:
        """Bind the invite to the key that uses it, for good. Raises `AuthorityError`."""
        name = _hashed(body.secret)
        record = self._read(name)
        if record is None:
            raise AuthorityError(
                "this invite is not known here",
                denied=True,
                hint="use it at the node that made it, or make a new one: trimaran tracker invite",
            )
        if record.key_fingerprint and record.key_fingerprint != key_fingerprint:
            raise AuthorityError(
                "this invite was used before", denied=True, hint="make a new one: trimaran tracker invite"
            )
        if self._wall_ms() >= record.expires_at_ms:
            raise AuthorityError(
                "this invite has expired", denied=True, hint="make a new one: trimaran tracker invite"
            )
        if (record.node_id, record.raft) != (body.id, body.raft):
            raise AuthorityError(
                f"this invite is for {record.node_id} at {record.raft}, not for {body.id} at {body.raft}",
                denied=True,
            )
        changed = msgspec.structs.replace(record, http=body.http, key_fingerprint=key_fingerprint)
        if changed != record:
            self._write(name, changed)

    def waiting(self) -> list[tuple[str, NodeInfo]]:
        """Nodes that were certified and are not yet admitted: (record's name, node)."""
        found = []
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []:
            record = self._read(path.stem)
            if record is not None and record.key_fingerprint and not record.admitted:
                info = NodeInfo(record.node_id, record.raft, record.http, record.key_fingerprint)
                found.append((path.stem, info))
        return found

    def admitted(self, name: str) -> None:
        record = self._read(name)
        if record is not None:
            self._write(name, msgspec.structs.replace(record, admitted=True))

    def _forget(self) -> None:
        for path in self._folder.glob("*.json") if self._folder.is_dir() else []:
            record = self._read(path.stem)
            if record is not None and self._wall_ms() > record.expires_at_ms + FORGET_SECONDS * 1000:
                path.unlink(missing_ok=True)

    def _read(self, name: str) -> _Record | None:
        try:
            return msgspec.json.decode((self._folder / f"{name}.json").read_bytes(), type=_Record)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            _log.warning("the record of an invite is damaged and counts no more: %s", name)
            return None

    def _write(self, name: str, record: _Record) -> None:
        path = self._folder / f"{name}.json"
        certificates.write_durably(path, msgspec.json.encode(record), mode=0o600)


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def make_invite(
    folder: DataFolder,
    *,
    cluster_id: str,
    inviter: str,
    node_id: str,
    raft: str,
    valid_seconds: int,
    now_ms: Callable[[], int] = wall_ms,
) -> str:
    """The invite file's content. Works on a node's folder whether or not the node runs; it is used while
    it does. Raises `AuthorityError`."""
    if not 60 <= valid_seconds <= INVITE_SECONDS_MAX:
        raise AuthorityError(
            f"an invite is valid for 60 to {INVITE_SECONDS_MAX} seconds, not {valid_seconds}",
            field="valid_seconds",
        )
    try:
        address = str(host_port(raft, field="raft", source="raft"))
    except ConfigError as error:
        raise AuthorityError(str(error), field="raft") from error
    load_authority(folder)  # no invite that could not be honoured
    secret, expires_at_ms = Invitations(folder.invites, now_ms).make(node_id, address, valid_seconds)
    return Invite(
        node_id=node_id,
        raft=address,
        cluster_id=cluster_id,
        inviter=inviter,
        ca_pem=folder.ca.read_text(),
        secret=secret,
        expires_at_ms=expires_at_ms,
    ).encode()


def load_authority(folder: DataFolder) -> tls.ClusterAuthority:
    try:
        return tls.ClusterAuthority.load(folder.ca, folder.ca_key)
    except CertificateProblem as error:
        raise AuthorityError(
            f"this node does not hold the cluster CA's key: {error}",
            hint="ask a node that has ca/ca.key in its data folder",
        ) from error


class NodeAuthority:
    """`cluster.authority.Authority` of a running node."""

    def __init__(
        self,
        folder: DataFolder,
        *,
        node_id: str,
        http: str,
        cluster_id: str,
        consensus: Consensus,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        self._folder = folder
        self._node_id = node_id
        self._http = http
        self._cluster_id = cluster_id
        self._consensus = consensus
        self._now_ms = now_ms
        self._invitations = Invitations(folder.invites, now_ms)
        self._peers: tls.PeerAuthority | None = None
        self._ca: Certificate | None = None
        self._admitting: asyncio.Task[None] | None = None
        self._joined = False  # since the list of those who wait was last read

    def reload(self) -> None:
        """Read the peer authority anew, after a renewal."""
        self._peers = tls.PeerAuthority.load(self._folder.peer_authority, self._folder.peer_authority_key)

    def operator_of(self, connection: SSLInfo) -> str | None:
        if self._ca is None:
            self._ca = certificates.load_certificate(self._folder.ca)
        return tls.operator_of(connection, self._ca)

    async def certify_peer(self, peer_id: str, csr_pem: str) -> tuple[str, int]:
        if self._peers is None:
            self.reload()
        assert self._peers is not None
        try:
            issued = await asyncio.to_thread(self._peers.certify, csr_pem, peer_id)
        except CertificateProblem as error:
            raise AuthorityError(str(error), field="csr_pem") from error
        return issued.pem, int(issued.expires_at.timestamp() * 1000)

    async def invite_node(self, body: t.InviteBody) -> str:
        if any(node.info.node_id == body.id for node in self._consensus.status().nodes):
            raise AuthorityError(f"the cluster already has a node {body.id}", field="id")
        return await asyncio.to_thread(
            make_invite,
            self._folder,
            cluster_id=self._cluster_id,
            inviter=self._http,
            node_id=body.id,
            raft=body.raft,
            valid_seconds=body.valid_seconds,
            now_ms=self._now_ms,
        )

    async def join_node(self, body: t.JoinBody) -> t.JoinAnswer:
        members = [node.info for node in self._consensus.status().nodes]
        answer = await asyncio.to_thread(self._certify_node, body, members)
        self.admit_in_background()
        return answer

    def _certify_node(self, body: t.JoinBody, members: list[NodeInfo]) -> t.JoinAnswer:
        authority = load_authority(self._folder)
        try:
            fingerprint = certificates.key_fingerprint(certificates.request_key(body.csr_pem))
            http = http_url(body.http, insecure=False, source="http")
            hosts = certificate_hosts(http, body.raft)
        except CertificateProblem as error:
            raise AuthorityError(str(error), field="csr_pem") from error
        except ConfigError as error:
            raise AuthorityError(str(error), field=error.field) from error
        # The secret first: without it, nobody learns who is a member.
        self._invitations.use(body, fingerprint)
        if any(node.node_id == body.id and node.key_fingerprint != fingerprint for node in members):
            raise AuthorityError(f"the cluster already has a node {body.id} with another key", field="id")
        try:
            return t.JoinAnswer(
                cluster_id=self._cluster_id,
                ca_pem=authority.pem,
                ca_key_pem=certificates.key_pem(authority.key).decode(),
                certificate_pem=authority.issue_node(body.csr_pem, body.id, hosts),
                peer_ca_certificate_pem=authority.issue_peer_authority(body.peer_ca_csr_pem, body.id),
                members=[
                    t.AddNodeBody(id=n.node_id, raft=n.raft, http=n.http, key_fingerprint=n.key_fingerprint)
                    for n in members
                ],
            )
        except CertificateProblem as error:
            raise AuthorityError(str(error), field="peer_ca_csr_pem") from error

    # --- admitting ------------------------------------------------------------------------------

    def admit_in_background(self) -> None:
        """Go on until everyone who was certified is in the membership. Called at the node's start too."""
        self._joined = True
        if self._admitting is None or self._admitting.done():
            self._admitting = asyncio.create_task(self._admit_all(), name="trimaran admitting")

    async def stop(self) -> None:
        if self._admitting is not None:
            self._admitting.cancel()
            await asyncio.gather(self._admitting, return_exceptions=True)

    async def _admit_all(self) -> None:
        while True:
            self._joined = False
            try:
                waiting = await asyncio.to_thread(self._invitations.waiting)
                if not waiting and not self._joined:  # one who came while this looked must not be overlooked
                    return
                for name, node in waiting:
                    if await self._answers(node) and await self._admit(node):
                        await asyncio.to_thread(self._invitations.admitted, name)
            except (OSError, CertificateProblem) as error:
                _log.warning("who was invited cannot be admitted now; it is tried again: %s", error)
            if not self._joined:
                await asyncio.sleep(LOOK_SECONDS)

    async def _admit(self, node: NodeInfo) -> bool:
        """Whether the leader says that it counts. What this node's own log says may yet be taken back."""
        try:
            await self._consensus.add_node(node, deadline_seconds=ADD_SECONDS)
        except MembershipError as error:
            _log.info("node %s is not in the membership yet: %s", node.node_id, error)
            return False
        _log.info("node %s at %s is now a member", node.node_id, node.raft)
        return True

    async def _answers(self, node: NodeInfo) -> bool:
        """Whether that node, and no other program, listens at its Raft address."""
        folder = self._folder
        context = await asyncio.to_thread(tls.raft_client_context, folder.ca, folder.certificate, folder.key)
        address = host_port(node.raft, field="raft", source="raft")
        try:
            async with asyncio.timeout(REACH_SECONDS):
                _, writer = await asyncio.open_connection(
                    address.host, address.port, ssl=context, server_hostname=""
                )
        except (OSError, TimeoutError):  # what TLS says among them
            return False
        shown = certificates.certificate_of(writer.get_extra_info("ssl_object"))
        writer.transport.abort()
        return shown is not None and certificates.key_fingerprint(shown.public_key()) == node.key_fingerprint
