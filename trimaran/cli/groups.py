"""Groups: who is in them, who asks to be, who may do what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from cyclopts import App, Parameter

from cluster.api.types import Done, GroupAnswer
from trimaran.output import Output, counted
from trimaran.settings import DEFAULTS, Common, a_name, usage
from trimaran.wiring import SignedIn, signed_in

app = App(name="group", help="Groups: make them, join them, run them.")

Group = Annotated[str, Parameter(help="The group's name.", validator=a_name)]
User = Annotated[str, Parameter(help="The user's name.", validator=a_name)]


async def _do(
    common: Common, told: str, intent: tuple[str, ...], change: Callable[[SignedIn, str], Awaitable[Done]]
) -> None:
    """A write, given its idempotency key; `intent` is the verb and what it is done to."""
    async with signed_in(common) as here:
        done = await here.once(intent, lambda key: change(here, key))
    Output.of(common).answer({"revision": done.revision}, told)


@app.command
async def create(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Make a group. Who makes it owns it."""
    await _do(
        common,
        f"The group {group} is yours.",
        ("create", group),
        lambda here, key: here.trackers.create_group(group, key=key),
    )


@app.command(name="list")
async def list_groups(*, common: Common = DEFAULTS) -> None:
    """List all groups, and what you are in them."""
    async with signed_in(common) as here:
        groups = (await here.trackers.list_groups()).groups
    out = Output.of(common)
    out.answer(
        groups,
        lambda: out.table(
            ("GROUP", "OWNER", "MEMBERS", "YOU ARE"),
            [
                (
                    each.name,
                    each.owner,
                    each.members,
                    each.role or ("asking to join" if each.requested else "-"),
                )
                for each in groups
            ],
            empty="There is no group yet. Make one: trimaran group create GROUP",
        ),
    )


@app.command
async def show(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Show a group and its members."""
    await _show(group, common, lambda here: here.trackers.show_group(group))


@app.command
async def members(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """List a group's members, longest-standing first."""
    await _show(group, common, lambda here: here.trackers.list_members(group))


async def _show(group: str, common: Common, ask: Callable[[SignedIn], Awaitable[GroupAnswer]]) -> None:
    async with signed_in(common) as here:
        answer = await ask(here)
    out = Output.of(common)
    document = {
        "name": answer.name,
        "owner": answer.owner,
        "members": answer.members,
        "role": answer.role,
        "member_count": answer.member_count,
    }
    out.answer(
        document,
        lambda: out.table(
            ("MEMBER", "ROLE", "SINCE"),
            [(each.user, each.role, each.since) for each in answer.members],
            empty=f"{group} belongs to {answer.owner}; it has {counted(answer.member_count, 'member')}. "
            "Who they are is told to members alone.",
        ),
    )


@app.command
async def join(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Ask to join a group. Its admins accept or reject."""
    await _do(
        common,
        f"Asked to join {group}; an admin accepts.",
        ("join", group),
        lambda here, key: here.trackers.request_join(group, key=key),
    )


@app.command
async def withdraw(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Withdraw your request to join."""
    await _do(
        common,
        f"You no longer ask to join {group}.",
        ("withdraw", group),
        lambda here, key: here.trackers.delete_join_request(group, here.user, key=key),
    )


@app.command
async def leave(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Leave a group. When the owner leaves, the longest-standing admin, else member, takes over; the last one out
    removes the group."""
    await _do(
        common,
        f"You left {group}.",
        ("leave", group),
        lambda here, key: here.trackers.remove_member(group, here.user, key=key),
    )


@app.command
async def requests(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """List who asks to join (admins)."""
    async with signed_in(common) as here:
        asking = (await here.trackers.list_join_requests(group)).requests
    out = Output.of(common)
    out.answer(
        asking,
        lambda: out.table(
            ("USER", "ASKED AT"),
            [(each.user, each.requested_at) for each in asking],
            empty=f"Nobody asks to join {group}.",
        ),
    )


@app.command
async def accept(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Let a user in who asked (admins)."""
    await _do(
        common,
        f"{user} is a member of {group}.",
        ("accept", group, user),
        lambda here, key: here.trackers.put_member(group, user, "accept", key=key),
    )


@app.command
async def reject(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Turn a request down (admins)."""
    await _do(
        common,
        f"{user}'s request is turned down.",
        ("reject", group, user),
        lambda here, key: here.trackers.delete_join_request(group, user, key=key),
    )


@app.command
async def kick(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Put a member out (admins). The members' peers refuse them at once, transfers in progress included."""
    async with signed_in(common) as here:
        if user == here.user:
            usage(
                "You cannot put yourself out. Nothing was changed.",
                f"Leave with: trimaran group leave {group}",
            )
    await _do(
        common,
        f"{user} is no longer a member of {group}.",
        ("kick", group, user),
        lambda here, key: here.trackers.remove_member(group, user, key=key),
    )


@app.command
async def promote(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Make a member an admin (owner)."""
    await _do(
        common,
        f"{user} is an admin of {group}.",
        ("promote", group, user),
        lambda here, key: here.trackers.put_member(group, user, "promote", key=key),
    )


@app.command
async def demote(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Make an admin a plain member (owner)."""
    await _do(
        common,
        f"{user} is a plain member of {group}.",
        ("demote", group, user),
        lambda here, key: here.trackers.put_member(group, user, "demote", key=key),
    )


@app.command
async def transfer(group: Group, user: User, /, *, common: Common = DEFAULTS) -> None:
    """Make another member the owner (owner). You stay as an admin."""
    await _do(
        common,
        f"{user} owns {group}.",
        ("transfer", group, user),
        lambda here, key: here.trackers.put_member(group, user, "transfer", key=key),
    )


@app.command
async def delete(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Delete a group with all it shares (owner). What members downloaded stays theirs."""
    await _do(
        common,
        f"The group {group} is deleted.",
        ("delete", group),
        lambda here, key: here.trackers.delete_group(group, key=key),
    )


@app.command
async def log(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """Read who was admitted, removed and promoted, when and by whom (admins)."""
    async with signed_in(common) as here:
        entries = (await here.trackers.group_log(group)).entries
    out = Output.of(common)
    out.answer(
        entries,
        lambda: out.table(
            ("REVISION", "AT", "WHO", "DID", "TO"),
            [(each.revision, each.at, each.actor, each.action, each.subject) for each in entries],
            empty="Nothing is in the log.",
        ),
    )


@app.command
async def quarantine(
    group: Group,
    /,
    *,
    lift: Annotated[str, Parameter(metavar="PEER", help="Let this peer serve again (admins).")] = "",
    common: Common = DEFAULTS,
) -> None:
    """List the peers that several members reported for wrong pieces, or lift one's quarantine (admins)."""
    if lift:
        await _do(
            common,
            f"{lift} may serve again.",
            ("quarantine", group, lift),
            lambda here, key: here.trackers.lift_quarantine(group, lift, key=key),
        )
        return
    async with signed_in(common) as here:
        peers = (await here.trackers.list_quarantine(group)).peers
    out = Output.of(common)
    out.answer(
        peers,
        lambda: out.table(
            ("PEER", "USER"),
            [(each.peer_id, each.user) for each in peers],
            empty="No peer is in quarantine.",
        ),
    )
