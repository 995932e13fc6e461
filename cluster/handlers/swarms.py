"""Peers, what they hold, and what others say of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.authority import AuthorityError
from cluster.call import Call
from cluster.handlers.files import no_file
from cluster.handlers.groups import done, require_member
from cluster.problems import ProblemError
from cluster.settings import ServiceSettings
from state_machine import names, queries
from state_machine.commands import Announcement, Fact, LiftQuarantine, PutPeer, ReportPeer
from state_machine.moments import rfc3339
from state_machine.outcomes import AnnounceValue
from state_machine.queries import SwarmPeerInfo

if TYPE_CHECKING:
    from cluster.service import Service

_INSECURE_SECONDS = 7 * 86_400  # when a peer of an insecure cluster binds itself again


def peer_id_of(call: Call) -> str:
    peer_id = call.params["peer_id"]
    if not names.is_peer_id(peer_id):
        raise ProblemError(kinds.INVALID, "A peer's id has 52 characters, a-z and 2-7.", field="peer_id")
    return peer_id


def not_yours(peer_id: str) -> ProblemError:
    """The same whether the peer is another user's or nobody's."""
    return ProblemError(
        kinds.DENIED,
        f"Peer {peer_id} is not bound to your account.",
        field="peer_id",
        hint="Bind it first: PUT /v1/peers/{peer_id}. A peer's home belongs to one user.",
    )


def _views(peers: list[SwarmPeerInfo]) -> list[t.SwarmPeer]:
    return [
        t.SwarmPeer(
            peer_id=peer.peer_id,
            user=peer.user,
            addresses=list(peer.addresses),
            pieces=peer.pieces,
            complete=peer.complete,
            quarantined=peer.quarantined,
        )
        for peer in peers
    ]


async def show_swarm(service: Service, call: Call) -> t.SwarmAnswer:
    await require_member(service, call)
    group, name, state = call.group, call.params["name"], service.machine.state
    manifest_id = call.query("manifest_id")
    if not manifest_id:
        file = queries.show_file(state, group, name)
        if file is None:
            raise no_file(call)
        manifest_id = file.manifest_id
    peers = queries.swarm_peers(state, group, name, manifest_id)
    if peers is None:
        raise ProblemError(
            kinds.NOT_FOUND, f"Group {group!r} shares no such version of {name!r}.", field="manifest_id"
        )
    return t.SwarmAnswer(group=group, name=name, manifest_id=manifest_id, peers=_views(peers))


async def put_peer(service: Service, call: Call) -> t.PeerAnswer:
    body: t.PeerBody = call.body
    peer_id = peer_id_of(call)
    certificate_pem, expires_at_ms = "", service.wall_ms() + _INSECURE_SECONDS * 1000
    if service.authority is not None:
        try:
            certificate_pem, expires_at_ms = await service.authority.certify_peer(peer_id, body.csr_pem)
        except AuthorityError as error:
            raise of_authority(error) from None
    known = queries.peer(service.machine.state, peer_id)
    revision = 0
    if known is None or known.user != call.user:
        outcome = await service.write_own(PutPeer(peer_id, call.user, service.wall_ms()))
        revision = outcome.revision
    else:
        await service.barrier()
        service.check_session(call)
    return t.PeerAnswer(
        peer_id=peer_id,
        certificate_pem=certificate_pem,
        expires_at=rfc3339(expires_at_ms),
        revision=revision,
    )


def of_authority(error: AuthorityError) -> ProblemError:
    kind = kinds.DENIED if error.denied else kinds.INVALID
    return ProblemError(kind, error.message, field=error.field, hint=error.hint)


def announcement_of(peer_id: str, user: str, body: t.AnnounceBody) -> Announcement:
    facts = tuple(
        Fact(fact.group, fact.name, fact.manifest_id, fact.pieces, fact.complete, fact.gone)
        for fact in body.facts
    )
    return Announcement(peer_id, user, tuple(body.addresses), facts, body.whole, body.leaving)


def announce_answer(settings: ServiceSettings, value: AnnounceValue) -> t.AnnounceAnswer:
    return t.AnnounceAnswer(
        lease_seconds=settings.lease_seconds,
        announce_seconds=settings.announce_seconds,
        whole_wanted=value.whole_wanted,
        dropped=[
            t.DroppedFact(group=f.group, name=f.name, manifest_id=f.manifest_id, reason=f.reason)
            for f in value.dropped
        ],
    )


async def announce(service: Service, call: Call) -> t.AnnounceAnswer:
    """Plain calls do not come here (`cluster/short_way.py`)."""
    peer_id = peer_id_of(call)
    value = await service.announcer.announce(announcement_of(peer_id, call.user, call.body))
    if not value.known:
        raise not_yours(peer_id)
    return announce_answer(service.settings, value)


async def put_seeder(service: Service, call: Call) -> t.Done:
    body: t.SeederBody = call.body
    await require_member(service, call)
    fact = Fact(call.group, call.params["name"], body.manifest_id, body.pieces, body.complete)
    value = await _announce_fact(service, call, fact, tuple(body.addresses))
    if value.dropped:
        reason = value.dropped[0].reason
        raise ProblemError(kinds.NOT_FOUND, f"It was not taken: {reason}.", field="manifest_id")
    return t.Done()


async def delete_seeder(service: Service, call: Call) -> t.Done:
    """Of the current version. Withdrawing what is not held is done already."""
    await require_member(service, call)
    group, name = call.group, call.params["name"]
    file = queries.show_file(service.machine.state, group, name)
    if file is None:
        raise no_file(call)
    await _announce_fact(service, call, Fact(group, name, file.manifest_id, 0, False, gone=True), ())
    return t.Done()


async def _announce_fact(
    service: Service, call: Call, fact: Fact, addresses: tuple[str, ...]
) -> AnnounceValue:
    peer_id = peer_id_of(call)
    value = await service.announcer.announce(Announcement(peer_id, call.user, addresses, (fact,)))
    if not value.known:
        raise not_yours(peer_id)
    return value


async def report_peer(service: Service, call: Call) -> t.Done:
    body: t.ReportBody = call.body
    command = ReportPeer(
        call.group, body.name, body.manifest_id, body.peer_id, body.fault, call.user, service.wall_ms()
    )
    return await done(service, call, command)


async def list_quarantine(service: Service, call: Call) -> t.QuarantineAnswer:
    await require_member(service, call)
    return t.QuarantineAnswer(peers=_views(queries.list_quarantine(service.machine.state, call.group)))


async def lift_quarantine(service: Service, call: Call) -> t.Done:
    command = LiftQuarantine(call.group, peer_id_of(call), call.user, service.wall_ms())
    return await done(service, call, command)


HANDLERS = (
    show_swarm,
    put_peer,
    announce,
    put_seeder,
    delete_seeder,
    report_peer,
    list_quarantine,
    lift_quarantine,
)
