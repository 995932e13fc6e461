"""The cluster itself: its status for everyone, its membership for operators."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.authority import AuthorityError
from cluster.call import Call
from cluster.consensus import MembershipError, MembershipUnknownError, NodeInfo
from cluster.handlers.swarms import of_authority
from cluster.problems import ProblemError
from state_machine import queries
from state_machine.commands import RetireSigningKey

if TYPE_CHECKING:
    from cluster.service import Service

_A = TypeVar("_A")


async def status(service: Service, call: Call) -> t.StatusAnswer:
    """As this node sees it, without asking anyone: it answers when nothing else does."""
    del call
    seen = service.consensus.status()
    reason = service.unready_reason()
    return t.StatusAnswer(
        cluster_id=service.settings.cluster_id,
        quorum=seen.quorum,
        ready=not reason,
        reason=reason,
        nodes=[
            t.NodeView(
                id=node.info.node_id,
                address=node.info.http,
                raft=node.info.raft,
                role=node.role.value,
                reachable=node.reachable,
                applied=node.applied,
                committed=node.committed,
            )
            for node in seen.nodes
        ],
        version=service.settings.version,
    )


async def list_nodes(service: Service, call: Call) -> t.StatusAnswer:
    return await status(service, call)


async def _change(work: Awaitable[_A]) -> _A:
    try:
        return await work
    except MembershipUnknownError as error:
        raise ProblemError(
            kinds.OUTCOME_UNKNOWN, str(error), hint="Look at the status, then repeat it if needed."
        ) from None
    except MembershipError as error:
        raise ProblemError(
            kinds.CONFLICT, str(error), hint="See the nodes, then decide: trimaran cluster status"
        ) from None


async def add_node(service: Service, call: Call) -> t.Done:
    body: t.AddNodeBody = call.body
    node = NodeInfo(body.id, body.raft, body.http, body.key_fingerprint)
    await _change(service.consensus.add_node(node, deadline_seconds=service.settings.membership_seconds))
    return t.Done()


async def remove_node(service: Service, call: Call) -> t.Done:
    """Its signing keys go too. What they signed ends with the longest token, so that no download fails;
    whoever signed in at that node signs in again after that."""
    node_id = call.params["id"]
    if all(node.info.node_id != node_id for node in service.consensus.status().nodes):
        raise ProblemError(
            kinds.NOT_FOUND,
            f"The cluster has no node {node_id!r}.",
            field="id",
            hint="See its nodes: trimaran cluster status",
        )
    settings = service.settings
    await _change(service.consensus.remove_node(node_id, deadline_seconds=settings.membership_seconds))
    until_ms = service.wall_ms() + round((settings.token_seconds + settings.skew_seconds) * 1000)
    for key in queries.signing_keys(service.machine.state):
        if key.node_id == node_id and (key.valid_until_ms is None or key.valid_until_ms > until_ms):
            await service.write_own(RetireSigningKey(key.key_id, until_ms))
    return t.Done()


async def transfer_leadership(service: Service, call: Call) -> t.Done:
    body: t.TransferBody = call.body
    await _change(
        service.consensus.transfer_leadership(body.to, deadline_seconds=service.settings.membership_seconds)
    )
    return t.Done()


async def invite_node(service: Service, call: Call) -> t.InviteAnswer:
    if service.authority is None:
        raise _no_authority()
    try:
        return t.InviteAnswer(invite=await service.authority.invite_node(call.body))
    except AuthorityError as error:
        raise of_authority(error) from None


async def join_node(service: Service, call: Call) -> t.JoinAnswer:
    if service.authority is None:
        raise _no_authority()
    try:
        return await _change(service.authority.join_node(call.body))
    except AuthorityError as error:
        raise of_authority(error) from None


def _no_authority() -> ProblemError:
    return ProblemError(
        kinds.UNSUPPORTED,
        "This cluster runs without certificates (--insecure), so it has none to give.",
        hint="Set the cluster up without --insecure.",
    )


HANDLERS = (status, list_nodes, add_node, remove_node, transfer_leadership, invite_node, join_node)
