"""Invites: single use, expiring, whole or not at all; and certificates that renew themselves."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaos_tests.ports import free_ports
from cluster import joining, tls
from cluster.api import certificates as certs
from cluster.api import types as t
from cluster.authority import AuthorityError
from cluster.config import ClusterFacts, ConfigError, NodeConfig
from cluster.consensus import (
    ConsensusStatus,
    MembershipError,
    MembershipUnknownError,
    NodeInfo,
    NodeStatus,
    Role,
)
from cluster.founding import init_first, init_join
from cluster.joining import Invite, NodeAuthority, make_invite
from cluster.renewal import Renewal, renew_due


class Members:
    """As much of consensus as joining needs; the whole of it is in the tests with processes."""

    def __init__(self, nodes: Sequence[NodeInfo]) -> None:
        self.nodes = list(nodes)
        self.refusals = 0
        self.forgets = 0  # how many additions are in the log when leadership is lost, and go with it
        self._losing = False
        self.lost = asyncio.Event()

    def status(self) -> ConsensusStatus:
        seen = [NodeStatus(node, Role.FOLLOWER, True, 0, 0) for node in self.nodes]
        return ConsensusStatus("n1", Role.LEADER, 1, "n1", True, 0, 0, nodes=seen)

    async def add_node(self, node: NodeInfo, *, deadline_seconds: float) -> None:
        if self.refusals:
            self.refusals -= 1
            raise MembershipError("another change is under way")
        if self.forgets:
            self.forgets -= 1
            self._losing = True
            self.nodes.append(node)
            asyncio.get_running_loop().call_later(0.1, self._lose, node)
            raise MembershipUnknownError("Leadership changed meanwhile")
        if self._losing:  # the addition is under way: told when it is settled
            await self.lost.wait()
        if node not in self.nodes:
            self.nodes.append(node)

    def _lose(self, node: NodeInfo) -> None:
        self.nodes.remove(node)
        self.lost.set()


class Clock:
    def __init__(self) -> None:
        self.ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def first(tmp_path: Path) -> NodeConfig:
    return init_first(
        tmp_path / "n1", {"node_id": "n1", "http": "localhost:7000", "raft": "localhost:7100"}, {}
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(first: NodeConfig, clock: Clock) -> NodeAuthority:
    return authority_of(first, clock)


def authority_of(config: NodeConfig, clock: Clock) -> NodeAuthority:
    facts = ClusterFacts.load(config.folder)
    return NodeAuthority(
        config.folder,
        node_id=config.node_id,
        http=config.http,
        cluster_id=facts.cluster_id,
        consensus=Members(facts.members),  # type: ignore[arg-type]
        now_ms=clock,
    )


def join_body(invite: str, *, key: Any = None, **changes: Any) -> t.JoinBody:
    opened = Invite.decode(invite)
    key = key or certs.new_key()
    said = {
        "id": opened.node_id,
        "secret": opened.secret,
        "http": "localhost:7001",
        "raft": opened.raft,
        "csr_pem": certs.make_request(key, "n2"),
        "peer_ca_csr_pem": certs.make_request(certs.new_key(), "n2"),
    }
    return t.JoinBody(**{**said, **changes})


async def invited(authority: NodeAuthority, valid_seconds: int = 3600) -> str:
    return await authority.invite_node(
        t.InviteBody(id="n2", raft="localhost:7101", valid_seconds=valid_seconds)
    )


async def test_an_invite_admits_one_key_and_answers_it_again(authority: NodeAuthority) -> None:
    invite = await invited(authority)
    key = certs.new_key()
    try:
        one = await authority.join_node(join_body(invite, key=key))
        two = await authority.join_node(join_body(invite, key=key))
        certificate = certs.parse_certificate(one.certificate_pem)
        assert certs.identity_of(certificate, certs.NODE_URI) == "n2"
        assert certs.spki(certs.parse_certificate(two.certificate_pem).public_key()) == certs.spki(
            key.public_key()
        )
        with pytest.raises(AuthorityError, match="used before") as caught:
            await authority.join_node(join_body(invite))
        assert caught.value.denied
    finally:
        await authority.stop()


async def test_an_invite_expires(authority: NodeAuthority, clock: Clock) -> None:
    invite = await invited(authority, valid_seconds=60)
    clock.ms += 60_000
    with pytest.raises(AuthorityError, match="expired") as caught:
        await authority.join_node(join_body(invite))
    assert caught.value.denied


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secret": "x" * 43}, "not known here"),
        ({"secret": "../../node"}, "not known here"),
        ({"id": "n3"}, "is for n2"),
        ({"raft": "elsewhere:1"}, "is for n2"),
        ({"csr_pem": "nonsense"}, "certificate request"),
        ({"peer_ca_csr_pem": "nonsense"}, "certificate request"),
        ({"http": "nonsense"}, "HOST:PORT"),
    ],
)
async def test_what_does_not_fit_is_refused(
    authority: NodeAuthority, changes: dict[str, str], words: str
) -> None:
    invite = await invited(authority)
    with pytest.raises(AuthorityError, match=words):
        await authority.join_node(join_body(invite, **changes))
    await authority.stop()


async def test_an_invite_for_a_node_that_exists_is_refused(authority: NodeAuthority) -> None:
    with pytest.raises(AuthorityError, match="already has a node n1"):
        await authority.invite_node(t.InviteBody(id="n1", raft="localhost:1"))
    for seconds in (0, -5, 10**9):
        with pytest.raises(AuthorityError, match="valid for"):
            await invited(authority, valid_seconds=seconds)
    with pytest.raises(AuthorityError) as caught:
        await authority.invite_node(t.InviteBody(id="n2", raft="nowhere"))
    assert caught.value.field == "raft"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=st.data())
def test_a_damaged_invite_is_told_from_a_whole_one(first: NodeConfig, data: st.DataObject) -> None:
    whole = make_invite(
        first.folder, cluster_id="c", inviter="https://h:1", node_id="n2", raft="h:2", valid_seconds=60
    )
    assert Invite.decode(f"  {whole[:50]}\n{whole[50:]}\n").node_id == "n2", "line breaks of mail do no harm"
    place = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    letter = data.draw(st.sampled_from("Ab1-_"))
    if kind == "cut":
        damaged = whole[:place]
    elif kind == "insert":
        damaged = whole[:place] + letter + whole[place:]
    else:
        damaged = whole[:place] + letter + whole[place + 1 :]
    try:
        opened = Invite.decode(damaged)
    except AuthorityError:
        return
    assert opened == Invite.decode(whole), "the last letter of base64 may carry bits that mean nothing"


def test_nonsense_is_no_invite() -> None:
    for text in ("", "x", "trimaran-invite-1.", "trimaran-invite-1.é", "trimaran-invite-1.AAAAAAAA"):
        with pytest.raises(AuthorityError):
            Invite.decode(text)


class Joiner:
    """A node that was certified, with the Raft port it will listen on."""

    def __init__(self, folder: Path, node_id: str) -> None:
        self.folder, self.node_id, self.key = folder, node_id, certs.new_key()
        folder.mkdir()
        (self.port,) = free_ports(1)

    async def joins(self, authority: NodeAuthority) -> None:
        invite = await authority.invite_node(t.InviteBody(id=self.node_id, raft=f"127.0.0.1:{self.port}"))
        answer = await authority.join_node(join_body(invite, key=self.key))
        for name, content in (
            ("ca", answer.ca_pem),
            ("certificate", answer.certificate_pem),
            ("key", certs.key_pem(self.key).decode()),
        ):
            (self.folder / name).write_text(content)

    async def listens(self) -> asyncio.Server:
        context = tls.raft_server_context(*(self.folder / name for name in ("ca", "certificate", "key")))
        return await asyncio.start_server(hang_up, "127.0.0.1", self.port, ssl=context)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "LOOK_SECONDS", 0.02)


@pytest.mark.usefixtures("quick")
async def test_only_who_answers_is_admitted(
    authority: NodeAuthority, first: NodeConfig, clock: Clock, tmp_path: Path
) -> None:
    """A node that was certified and never started must not get into the membership; one that starts must,
    even when the inviter restarted in between, and only once."""
    joiner = Joiner(tmp_path / "n2", "n2")
    await joiner.joins(authority)
    await asyncio.sleep(0.2)
    assert len(members_of(authority).nodes) == 1
    await authority.stop()

    again = authority_of(first, clock)
    members_of(again).refusals = 2
    again.admit_in_background()
    async with await joiner.listens():
        assert again._admitting is not None
        await asyncio.wait_for(again._admitting, 10)
    assert [node.node_id for node in members_of(again).nodes] == ["n1", "n2"]
    third = authority_of(first, clock)
    third.admit_in_background()
    assert third._admitting is not None
    await asyncio.wait_for(third._admitting, 10)
    assert len(members_of(third).nodes) == 1, "a node that was removed later is not brought back"


@pytest.mark.usefixtures("quick")
async def test_another_program_at_the_address_is_not_admitted(
    authority: NodeAuthority, tmp_path: Path
) -> None:
    """It would be a learner for good, and while there is one nobody else can be added."""
    joiner, other = Joiner(tmp_path / "n2", "n2"), Joiner(tmp_path / "n3", "n3")
    await joiner.joins(authority)
    plain = await asyncio.start_server(hang_up, "127.0.0.1", joiner.port)
    async with plain:
        await asyncio.sleep(0.2)
        assert len(members_of(authority).nodes) == 1
    await other.joins(authority)
    other.port = joiner.port
    async with await other.listens():  # a node of the cluster, but not that one
        await asyncio.sleep(0.2)
        assert len(members_of(authority).nodes) == 1
    async with await joiner.listens():
        await until_members(authority, ["n1", "n2"])
    await authority.stop()


@pytest.mark.usefixtures("quick")
async def test_a_node_is_admitted_when_the_leader_says_so_and_not_when_it_is_merely_in_the_log(
    authority: NodeAuthority, tmp_path: Path
) -> None:
    """A leader that loses its place has the addition in its log until the next one takes it out again."""
    joiner = Joiner(tmp_path / "n2", "n2")
    members = members_of(authority)
    members.forgets = 1
    await joiner.joins(authority)
    async with await joiner.listens():
        assert authority._admitting is not None
        await asyncio.wait_for(authority._admitting, 10)
        async with asyncio.timeout(10):
            await members.lost.wait()
    assert [node.node_id for node in members.nodes] == ["n1", "n2"]


@pytest.mark.usefixtures("quick")
async def test_a_full_disk_does_not_end_the_admitting(
    authority: NodeAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joiner = Joiner(tmp_path / "n2", "n2")
    tried: list[str] = []
    plain = joining.Invitations.admitted

    def full_at_first(self: joining.Invitations, name: str) -> None:
        tried.append(name)
        if len(tried) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, name)

    monkeypatch.setattr(joining.Invitations, "admitted", full_at_first)
    await joiner.joins(authority)
    async with await joiner.listens():
        assert authority._admitting is not None
        await asyncio.wait_for(authority._admitting, 10)
    assert len(tried) == 3
    assert [node.node_id for node in members_of(authority).nodes] == ["n1", "n2"]


def members_of(authority: NodeAuthority) -> Members:
    members = authority._consensus
    assert isinstance(members, Members)
    return members


async def until_members(authority: NodeAuthority, node_ids: list[str]) -> None:
    async with asyncio.timeout(10):
        while [node.node_id for node in members_of(authority).nodes] != node_ids:
            await asyncio.sleep(0.01)


async def test_a_node_without_the_cas_key_says_so(authority: NodeAuthority, first: NodeConfig) -> None:
    first.folder.ca_key.unlink()
    with pytest.raises(AuthorityError, match="does not hold the cluster CA's key"):
        await invited(authority)


async def test_peers_are_certified_for_days(authority: NodeAuthority) -> None:
    key = certs.new_key()
    peer_id = certs.peer_id_of_key(key.public_key())
    pem, expires_at_ms = await authority.certify_peer(peer_id, certs.peer_request(key))
    assert pem.count("BEGIN CERTIFICATE") == 2
    days = (expires_at_ms / 1000 - tls.utc_now().timestamp()) / 86_400
    assert 1 < days <= tls.PEER_DAYS
    with pytest.raises(AuthorityError) as caught:
        await authority.certify_peer("a" * 52, certs.peer_request(key))
    assert caught.value.field == "csr_pem"


def test_a_folder_is_founded_once(first: NodeConfig) -> None:
    with pytest.raises(ConfigError, match="already"):
        init_first(first.data_dir, {"node_id": "n9", "http": "h:1", "raft": "h:2"}, {})
    assert first.data_dir.stat().st_mode & 0o077 == 0
    for private in (
        first.folder.ca_key,
        first.folder.key,
        first.folder.peer_authority_key,
        first.folder.operator_key,
    ):
        assert private.stat().st_mode & 0o777 == 0o600


async def test_an_expired_invite_is_refused_before_anyone_is_asked(first: NodeConfig, tmp_path: Path) -> None:
    invite = make_invite(
        first.folder,
        cluster_id="c",
        inviter="https://127.0.0.1:1",
        node_id="n2",
        raft="h:2",
        valid_seconds=60,
        now_ms=lambda: 0,
    )
    with pytest.raises(AuthorityError, match="expired"):
        await init_join(invite, tmp_path / "n2", {"http": "h:1"}, {})
    assert not (tmp_path / "n2").exists()


# --- renewal ------------------------------------------------------------------------------------


def test_nothing_is_renewed_before_it_is_due(first: NodeConfig) -> None:
    assert not renew_due(first, tls.utc_now() + timedelta(days=tls.NODE_DAYS * 0.5))


async def test_certificates_renew_themselves_and_keep_the_key(first: NodeConfig) -> None:
    folder = first.folder
    before = certs.load_certificate(folder.certificate)
    peers_before = certs.load_certificate(folder.peer_authority)
    context = tls.https_context(folder.ca, folder.certificate, folder.key)
    told: list[int] = []
    later = tls.utc_now() + timedelta(days=tls.NODE_DAYS * 0.7)
    renewal = Renewal(first, [context], lambda: told.append(1), now=lambda: later)
    assert await renewal.look()
    after = certs.load_certificate(folder.certificate)
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert (
        certs.load_certificate(folder.peer_authority).not_valid_after_utc > peers_before.not_valid_after_utc
    )
    assert certs.key_fingerprint(after.public_key()) == certs.key_fingerprint(before.public_key())
    assert told == [1]
    assert not await renewal.look()


async def test_a_node_that_cannot_renew_goes_on_and_says_so(
    first: NodeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    first.folder.ca_key.unlink()
    later = tls.utc_now() + timedelta(days=tls.NODE_DAYS * 0.7)
    renewal = Renewal(first, [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)], lambda: None, now=lambda: later)
    for _ in range(3):
        assert not await renewal.look()
    assert len([r for r in caplog.records if "cannot be renewed" in r.getMessage()]) == 1
