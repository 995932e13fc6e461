"""Making data folders: the first node of a cluster, a node that joins one, several at once on one machine.

Owned here: what `tracker init` writes, and in which order. `cluster.json` comes last: a folder without
it is no node's, so an interrupted init leaves nothing that could start half made, and may be repeated.
Left to others: the invite (`joining.py`), running (`app.py`).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import tls
from cluster.api import certificates
from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.authority import AuthorityError
from cluster.config import ClusterFacts, ConfigError, DataFolder, NodeConfig, parse_config, render
from cluster.consensus import NodeInfo
from cluster.joining import Invite, wall_ms

OPERATOR = "operator"
JOIN_SECONDS = 30.0


def init_first(data_dir: Path, flags: Mapping[str, Any], environment: Mapping[str, str]) -> NodeConfig:
    """The first node, which is the whole cluster for now: makes the CA and an operator's certificate.
    `flags`: node_id, http, raft, insecure, ... Raises `ConfigError`."""
    config = parse_config(data_dir, flags=flags, environment=environment)
    return found([config])[0]


def found(configs: Sequence[NodeConfig]) -> list[NodeConfig]:
    """A new cluster of these nodes, all on this machine. The CA's key lies with each of them."""
    for config in configs:
        _must_be_new(config.folder)
    cluster_id = secrets.token_hex(8)
    first = configs[0].folder
    if configs[0].insecure:
        members = [NodeInfo(c.node_id, str(c.raft), c.http, "") for c in configs]
    else:
        authority = tls.ClusterAuthority.make(cluster_id)
        members = [_certify(config, authority) for config in configs]
        key = certificates.load_or_make_key(first.operator_key)
        pem = authority.issue_operator(certificates.make_request(key, OPERATOR), OPERATOR)
        certificates.write_durably(first.operator, pem.encode())
    for config in configs:
        _finish(config, ClusterFacts(cluster_id=cluster_id, members=members))
    return list(configs)


def _certify(config: NodeConfig, authority: tls.ClusterAuthority) -> NodeInfo:
    folder = config.folder
    _make_private(folder)
    authority.save(folder.ca, folder.ca_key)
    key = certificates.load_or_make_key(folder.key)
    pem = authority.issue_node(
        certificates.make_request(key, config.node_id), config.node_id, config.http_hosts
    )
    certificates.write_durably(folder.certificate, pem.encode())
    peer_key = certificates.load_or_make_key(folder.peer_authority_key)
    pem = authority.issue_peer_authority(certificates.make_request(peer_key, config.node_id), config.node_id)
    certificates.write_durably(folder.peer_authority, pem.encode())
    fingerprint = certificates.key_fingerprint(key.public_key())
    return NodeInfo(config.node_id, str(config.raft), config.http, fingerprint)


async def init_join(
    invite_text: str, data_dir: Path, flags: Mapping[str, Any], environment: Mapping[str, str]
) -> NodeConfig:
    """A node that joins with an invite. `flags`: http, and whatever else differs; id and Raft address
    are the invite's. Raises `ConfigError`, `AuthorityError` for a bad invite, `TrackerError` when the
    inviter refuses or cannot be reached; in all cases it may be repeated with the same folder."""
    invite = Invite.decode(invite_text)
    if wall_ms() >= invite.expires_at_ms:
        raise AuthorityError(
            "this invite has expired", denied=True, hint="make a new one: trimaran tracker invite"
        )
    for name, said in (("node_id", invite.node_id), ("raft", invite.raft)):
        if flags.get(name) not in (None, said):
            raise ConfigError(
                f"--{name.replace('_', '-')} is {flags[name]!r}, but the invite says {said!r}", field=name
            )
    own = {**flags, "node_id": invite.node_id, "raft": invite.raft, "insecure": False}
    config = parse_config(data_dir, flags=own, environment=environment)
    folder = config.folder
    _must_be_new(folder)
    _make_private(folder)
    certificates.write_durably(folder.ca, invite.ca_pem.encode())
    # The same keys at every attempt: the invite admits one key only.
    key = certificates.load_or_make_key(folder.key)
    peer_key = certificates.load_or_make_key(folder.peer_authority_key)
    body = t.JoinBody(
        id=config.node_id,
        secret=invite.secret,
        http=config.http,
        raft=str(config.raft),
        csr_pem=certificates.make_request(key, config.node_id),
        peer_ca_csr_pem=certificates.make_request(peer_key, config.node_id),
    )
    async with TrackerClient([invite.inviter], ca=folder.ca, write_deadline_seconds=JOIN_SECONDS) as inviter:
        answer = await inviter.join_node(body)
    if answer.ca_key_pem:
        certificates.write_durably(folder.ca_key, answer.ca_key_pem.encode(), mode=0o600)
    certificates.write_durably(folder.certificate, answer.certificate_pem.encode())
    certificates.write_durably(folder.peer_authority, answer.peer_ca_certificate_pem.encode())
    members = [NodeInfo(node.id, node.raft, node.http, node.key_fingerprint) for node in answer.members]
    _finish(config, ClusterFacts(cluster_id=answer.cluster_id, members=members))
    return config


def _make_private(folder: DataFolder) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.path.chmod(0o700)


def _must_be_new(folder: DataFolder) -> None:
    if folder.cluster.exists():
        raise ConfigError(
            f"{folder.path} is a node's data folder already; run it with `trimaran tracker run`, "
            "or give another folder",
            field="data_dir",
        )
    if folder.path.exists() and not os.access(folder.path, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder.path} cannot be written by this user", field="data_dir")


def _finish(config: NodeConfig, facts: ClusterFacts) -> None:
    folder = config.folder
    _make_private(folder)
    certificates.write_durably(folder.settings, render(config).encode(), mode=0o600)
    certificates.write_durably(folder.cluster, facts.encode(), mode=0o600)
