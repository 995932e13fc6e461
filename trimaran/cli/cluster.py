"""The cluster as its operators see it: state, nodes, leader, who may register."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from msgspec.structs import replace

from cluster.api.types import AddNodeBody, NodeView, StatusAnswer
from trimaran.cli.people import PasswordStdin, new_password
from trimaran.operating import with_cluster
from trimaran.output import Output
from trimaran.settings import DEFAULTS, Common, usage
from trimaran.wiring import as_operator, trackers

if TYPE_CHECKING:
    from cluster.api.client import TrackerClient

app = App(name="cluster", help="The cluster's nodes, for its operators.")

NodeId = Annotated[str, Parameter(help="The node's id, like n1.")]
Operator = Annotated[
    str,
    Parameter(metavar="DIR", help="A folder with the operator's certificate; a node's data folder has one."),
]


async def _survey(client: TrackerClient, *, seconds: float) -> StatusAnswer:
    """What any node says of the cluster, with each node's own word about itself: only the node knows how far it
    is. One that does not answer us within `seconds` is not reachable."""
    from cluster.api.errors import TrackerError

    answer = await client.within(max(seconds, 5.0)).status()

    async def own_word(seen: NodeView) -> tuple[NodeView, StatusAnswer | None]:
        if seen.id == answer.node:
            return seen, answer
        try:
            said = await client.within(seconds).status(at=seen.address)
        except TrackerError:
            return replace(seen, reachable=False), None
        own = next((each for each in said.nodes if each.id == seen.id), seen)
        return replace(own, reachable=True), said

    words = await asyncio.gather(*(own_word(each) for each in answer.nodes))
    # Whoever is furthest in time says who leads: a node that was cut off remembers an old leader.
    latest = max([answer, *(said for _, said in words if said)], key=lambda each: (each.quorum, each.term))
    # The leader knows how far a node was that says nothing any more; the others do not.
    leaders = {
        each.id: each for said in words if said[1] and said[1].node == latest.leader for each in said[1].nodes
    }
    nodes = [
        view if view.reachable else replace(leaders.get(view.id, view), reachable=False) for view, _ in words
    ]
    return replace(latest, nodes=nodes)


def _document(status: StatusAnswer) -> dict[str, object]:
    return {
        "quorum": status.quorum,
        "leader": status.leader,
        "term": status.term,
        "revision": status.revision,
        "nodes": status.nodes,
        "node": status.node,
        "cluster_id": status.cluster_id,
        "version": status.version,
    }


def _print(out: Output, status: StatusAnswer) -> None:
    quorum = (
        "has a quorum"
        if status.quorum
        else "has NO quorum: nothing can be changed until enough nodes are back"
    )
    out.say(
        f"The cluster {quorum}. Leader {status.leader or '-'}, term {status.term}, revision {status.revision}."
    )
    out.table(
        ("NODE", "ADDRESS", "ROLE", "REACHABLE", "APPLIED", "COMMITTED"),
        [
            (each.id, each.address, each.role, "yes", each.applied, each.committed)
            if each.reachable
            else (each.id, each.address, "does not answer", "NO", "-", "-")
            for each in status.nodes
        ],
        empty="No node is known.",
    )


@app.command
async def status(*, common: Common = DEFAULTS) -> None:
    """Show quorum, leader and nodes. Any node that answers will do; no sign-in is needed."""
    from cluster.api.errors import Unavailable
    from peer.trouble import of_tracker

    async with trackers(with_cluster(common)) as client:
        try:
            answer = await _survey(client, seconds=2.0)
        except Unavailable as error:
            told = of_tracker(error)
            if error.code == "cluster-unavailable":
                told.hint = "Check that the nodes run (trimaran tracker run), their addresses, and the network between."
            raise told from error
    out = Output.of(common)
    out.answer(_document(answer), lambda: _print(out, answer))


@app.command
async def watch(
    *,
    interval_seconds: Annotated[float, Parameter(help="How often to look.")] = 0.5,
    count: Annotated[int, Parameter(help="End after so many changes; 0 goes on until Ctrl-C.")] = 0,
    common: Common = DEFAULTS,
) -> None:
    """Print the cluster's state now, and again whenever leader, term, quorum or a node's state changes."""
    from cluster.api.errors import TrackerError

    if interval_seconds <= 0:
        usage("--interval-seconds must be positive.")
    out = Output.of(common)
    last: object = None
    printed = 0
    async with trackers(with_cluster(common)) as client:
        while not count or printed < count:
            try:
                answer = await _survey(client, seconds=1.0)
            except TrackerError as error:
                if last is None:
                    raise
                if last != error.code:
                    out.note(f"No node answers: {error.message}")
                last = error.code
            else:
                seen = (
                    answer.quorum,
                    answer.leader,
                    answer.term,
                    tuple((each.id, each.role, each.reachable) for each in answer.nodes),
                )
                if seen != last:
                    out.answer(_document(answer), lambda answer=answer: _print(out, answer))  # type: ignore[misc]
                    printed += 1
                last = seen
            if not count or printed < count:
                await asyncio.sleep(interval_seconds)


@app.command
async def add(
    node_id: NodeId,
    /,
    *,
    http: Annotated[str, Parameter(metavar="HOST:PORT", help="Where it serves users.")],
    raft: Annotated[str, Parameter(metavar="HOST:PORT", help="Where it serves the other nodes.")],
    key_fingerprint: Annotated[str, Parameter(metavar="HEX", help="SHA-256 of the node's public key.")],
    operator: Operator = "",
    common: Common = DEFAULTS,
) -> None:
    """Add a node whose key you already have. Usually `tracker invite` and `tracker init --join` do this."""
    body = AddNodeBody(id=node_id, raft=raft, http=http, key_fingerprint=key_fingerprint)
    async with as_operator(common, operator) as client:
        done = await client.add_node(body)
    Output.of(common).answer({"revision": done.revision}, f"{node_id} is a node of the cluster.")


@app.command
async def remove(node_id: NodeId, /, *, operator: Operator = "", common: Common = DEFAULTS) -> None:
    """Remove a node. It stops, and its data folder can never rejoin."""
    async with as_operator(common, operator) as client:
        done = await client.remove_node(node_id)
    Output.of(common).answer({"revision": done.revision}, f"{node_id} is no longer a node of the cluster.")


@app.command
async def transfer(
    node_id: Annotated[str, Parameter(help="The new leader; else the one that has most.")] = "",
    /,
    *,
    operator: Operator = "",
    common: Common = DEFAULTS,
) -> None:
    """Move the leadership to another node, without an election."""
    async with as_operator(common, operator) as client:
        done = await client.transfer_leadership(node_id or None)
    Output.of(common).answer({"revision": done.revision}, f"The leader is {done.leader or node_id}.")


@app.command
async def policy(
    registration: Annotated[Literal["open", "invitation"], Parameter(help="Who may register.")],
    /,
    *,
    operator: Operator = "",
    common: Common = DEFAULTS,
) -> None:
    """Say whether anyone may register, or only who was invited."""
    async with as_operator(common, operator) as client:
        done = await client.set_policy(registration)
    Output.of(common).answer({"revision": done.revision}, f"Registration: {registration}.")


@app.command
async def invitation(
    *,
    valid_seconds: Annotated[int, Parameter(help="How long it may be used.")] = 7 * 86_400,
    operator: Operator = "",
    common: Common = DEFAULTS,
) -> None:
    """Make an invitation for one user (`trimaran register USER --invitation ...`)."""
    async with as_operator(common, operator) as client:
        answer = await client.create_invitation(valid_seconds=valid_seconds)
    Output.of(common).answer(
        {"invitation": answer.invitation, "revision": answer.revision}, answer.invitation
    )


@app.command
async def reset_password(
    user: Annotated[str, Parameter(help="Whose password was lost.")],
    /,
    *,
    password_stdin: PasswordStdin = False,
    operator: Operator = "",
    common: Common = DEFAULTS,
) -> None:
    """Give a user a new password. All sessions of the account end.

    It is asked for, or taken from TRIMARAN_NEW_PASSWORD, or from the first line of stdin with --password-stdin.
    """
    new = await new_password(password_stdin)
    async with as_operator(common, operator) as client:
        done = await client.reset_password(user, new)
    Output.of(common).answer(
        {"revision": done.revision},
        f"{user} has a new password; whoever was signed in as {user} is not any more.",
    )
