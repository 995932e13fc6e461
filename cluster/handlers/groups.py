"""Groups, members, requests to join, and the log of rights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.call import Call
from cluster.problems import ProblemError
from state_machine import queries
from state_machine.commands import (
    AcceptRequest,
    AnyCommand,
    CreateGroup,
    DeleteGroup,
    DemoteMember,
    KickMember,
    LeaveGroup,
    PromoteMember,
    RejectRequest,
    RequestJoin,
    TransferGroup,
    WithdrawRequest,
)
from state_machine.moments import rfc3339
from state_machine.queries import Membership

if TYPE_CHECKING:
    from cluster.service import Service


async def require_member(service: Service, call: Call) -> Membership:
    """The caller's membership in the call's group, linearizably. A stranger learns nothing: the answer is
    the same for a group that does not exist. Raises `ProblemError`."""
    await service.fresh(call)
    membership = queries.membership(service.machine.state, call.group, call.user)
    if membership is None:
        raise ProblemError(kinds.DENIED, f"{call.user!r} is not a member of group {call.group!r}.")
    return membership


async def require_admin(service: Service, call: Call, to: str) -> None:
    membership = await require_member(service, call)
    if membership.role == "member":
        raise ProblemError(
            kinds.DENIED,
            f"Only an admin or the owner of group {call.group!r} may {to}.",
            hint="Ask an admin of the group.",
        )


def token_expiry_ms(service: Service) -> int:
    """No token issued by now, by any node, is accepted after this."""
    settings = service.settings
    return service.wall_ms() + round((settings.token_seconds + settings.skew_seconds) * 1000)


async def done(service: Service, call: Call, command: AnyCommand) -> t.Done:
    outcome = await service.write(call, command)
    return t.Done(revision=outcome.revision)


async def list_groups(service: Service, call: Call) -> t.GroupsAnswer:
    await service.fresh(call)
    groups = [
        t.GroupView(
            name=group.name,
            owner=group.owner,
            members=group.members,
            role=group.role,
            requested=group.requested,
        )
        for group in queries.list_groups(service.machine.state, call.user)
    ]
    return t.GroupsAnswer(groups=groups)


async def create_group(service: Service, call: Call) -> t.Done:
    return await done(service, call, CreateGroup(call.body.name, call.user, service.wall_ms()))


async def show_group(service: Service, call: Call) -> t.GroupAnswer:
    """Groups are listed publicly, so a stranger sees the name, the owner and the number of members."""
    await service.fresh(call)
    state = service.machine.state
    group = queries.show_group(state, call.group, call.user)
    if group is None:
        raise ProblemError(
            kinds.NOT_FOUND,
            f"There is no group {call.group!r}.",
            field="group",
            hint="See all groups: trimaran group list",
        )
    members = [] if group.role is None else _members(service, call.group)
    return t.GroupAnswer(
        name=group.name, owner=group.owner, role=group.role, member_count=group.members, members=members
    )


async def list_members(service: Service, call: Call) -> t.GroupAnswer:
    membership = await require_member(service, call)
    group = queries.show_group(service.machine.state, call.group, call.user)
    assert group is not None, "who is a member is a member of a group"
    members = _members(service, call.group)
    return t.GroupAnswer(
        name=group.name, owner=group.owner, role=membership.role, member_count=len(members), members=members
    )


def _members(service: Service, group: str) -> list[t.MemberView]:
    return [
        t.MemberView(user=member.user, role=member.role, since=rfc3339(member.since_ms))
        for member in queries.list_members(service.machine.state, group)
    ]


async def delete_group(service: Service, call: Call) -> t.Done:
    command = DeleteGroup(call.group, call.user, service.wall_ms(), token_expiry_ms(service))
    return await done(service, call, command)


async def put_member(service: Service, call: Call) -> t.Done:
    body: t.MemberBody = call.body
    group, user, actor, now_ms = call.group, call.params["user"], call.user, service.wall_ms()
    command: AnyCommand
    match body.change:
        case "accept":
            command = AcceptRequest(group, user, actor, now_ms)
        case "promote":
            command = PromoteMember(group, user, actor, now_ms)
        case "demote":
            command = DemoteMember(group, user, actor, now_ms)
        case "transfer":
            command = TransferGroup(group, user, actor, now_ms)
    return await done(service, call, command)


async def remove_member(service: Service, call: Call) -> t.Done:
    group, user, actor, now_ms = call.group, call.params["user"], call.user, service.wall_ms()
    expiry_ms = token_expiry_ms(service)
    if user == actor:
        return await done(service, call, LeaveGroup(group, actor, now_ms, expiry_ms))
    return await done(service, call, KickMember(group, user, actor, now_ms, expiry_ms))


async def list_join_requests(service: Service, call: Call) -> t.JoinRequestsAnswer:
    await require_admin(service, call, "see who asks to join")
    requests = [
        t.JoinRequestView(user=request.user, requested_at=rfc3339(request.requested_ms))
        for request in queries.list_join_requests(service.machine.state, call.group)
    ]
    return t.JoinRequestsAnswer(requests=requests)


async def request_join(service: Service, call: Call) -> t.Done:
    return await done(service, call, RequestJoin(call.group, call.user, service.wall_ms()))


async def delete_join_request(service: Service, call: Call) -> t.Done:
    group, user, actor, now_ms = call.group, call.params["user"], call.user, service.wall_ms()
    if user == actor:
        return await done(service, call, WithdrawRequest(group, actor, now_ms))
    return await done(service, call, RejectRequest(group, user, actor, now_ms))


async def group_log(service: Service, call: Call) -> t.LogAnswer:
    await require_admin(service, call, "read its log of rights")
    entries = [
        t.LogView(
            revision=entry.revision,
            at=rfc3339(entry.at_ms),
            actor=entry.actor,
            action=entry.action,
            subject=entry.subject,
        )
        for entry in queries.group_log(service.machine.state, call.group)
    ]
    return t.LogAnswer(entries=entries)


HANDLERS = (
    list_groups,
    create_group,
    show_group,
    delete_group,
    list_members,
    put_member,
    remove_member,
    list_join_requests,
    request_join,
    delete_join_request,
    group_log,
)
