"""Groups, their members, and who may change them.

The owner is one, admins are many. Succession: when the owner leaves, the longest-standing admin (who
has been admin for longest), else the longest-standing member, takes over; the last one out removes the
group. Standing is counted in revisions, so no two members stand equally long.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from state_machine import limits
from state_machine.commands import (
    AcceptRequest,
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
from state_machine.model import Group, GroupLog, JoinRequest, LogEntry, Member, Role, State
from state_machine.moments import rfc3339
from state_machine.names import name_fault, quoted
from state_machine.outcomes import Code, Refused

from .draft import Draft
from .leaving import refuse_revocations, revoke, user_leaves_swarms
from .rights import RANKS, require_admin, require_member, require_owner

_EMPTY_LOG: Final = GroupLog(())


def record(state: State, draft: Draft, group: str, at_ms: int, actor: str, action: str, subject: str) -> None:
    """Write a line into the group's log of rights."""
    entry = LogEntry(draft.revision, at_ms, actor, action, subject)
    log = state.group_logs.get(group) or _EMPTY_LOG
    kept = log.entries[-(limits.GROUP_LOG_ENTRIES_MAX - 1) :]
    state.group_logs.put(group, GroupLog((*kept, entry)))


def _member_path(group: str, user: str) -> str:
    return f"/groups/{group}/members/{user}"


def _put_member(state: State, draft: Draft, type_: str, group: str, user: str, member: Member) -> None:
    state.members.put(group, user, member)
    value = {"user": user, "role": member.role, "since": rfc3339(member.since_ms), "epoch": member.epoch}
    draft.emit(type_, _member_path(group, user), value)


def _change_role(state: State, draft: Draft, group: str, user: str, role: Role) -> None:
    member = state.members.get(group, user)
    assert member is not None
    changed = replace(member, role=role, role_epoch=draft.revision)
    _put_member(state, draft, "member.changed", group, user, changed)


_SEE_GROUPS = "See all groups, and what you are in them: trimaran group list"
_SEE_MEMBERS = "See its members and their roles: trimaran group members GROUP"


def _not_in_group(draft: Draft, group: str, user: str) -> Refused:
    return draft.refuse(
        Code.NOT_FOUND, f"group {quoted(group)} has no member {quoted(user)}", "user", _SEE_MEMBERS
    )


def _owns_too_many(state: State, draft: Draft, user: str) -> Refused | None:
    if state.owned_counts.get(user, 0) < limits.GROUPS_PER_USER_MAX:
        return None
    return draft.refuse(
        Code.OVER_LIMIT,
        f"{quoted(user)} owns {limits.GROUPS_PER_USER_MAX} groups already",
        "group",
        "Delete or transfer a group first.",
    )


def create_group(state: State, command: CreateGroup, draft: Draft) -> Any:
    group, actor = command.group, command.actor
    if actor not in state.users:
        return draft.refuse(Code.DENIED, f"there is no user {quoted(actor)}", hint="Register first.")
    fault = name_fault(group, "group name")
    if fault is not None:
        return draft.refuse(Code.INVALID, fault, "name", "Choose another name.")
    if len(group) > limits.GROUP_NAME_CHARS_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"the group name has {len(group)} characters, more than {limits.GROUP_NAME_CHARS_MAX}",
            "name",
            "Choose a shorter name.",
        )
    if group in state.groups:
        return draft.refuse(
            Code.CONFLICT, f"the group name {quoted(group)} is taken", "name", "Choose another name."
        )
    refused = _owns_too_many(state, draft, actor)
    if refused is not None:
        return refused
    if len(state.groups) >= limits.GROUPS_MAX:
        return draft.refuse(Code.OVER_LIMIT, f"the cluster has {limits.GROUPS_MAX} groups already", "name")

    revision, at_ms = draft.revision, command.at_ms
    state.put_group(group, Group(actor, at_ms, revision))
    draft.emit("group.created", f"/groups/{group}", {"owner": actor, "group_id": revision})
    owner = Member("owner", at_ms, revision, revision)
    _put_member(state, draft, "member.added", group, actor, owner)
    record(state, draft, group, at_ms, actor, "create", group)
    return {"group_id": revision}


def _remove_group(state: State, draft: Draft, group: str, token_expiry_ms: int) -> None:
    before = state.revocations.rows(group).values()
    expires_ms = max([token_expiry_ms, *(row.expires_ms for row in before)])
    state.revocations.drop_all(group)  # the one for all tokens, below, says more than each of them
    row = state.groups.get(group)
    assert row is not None
    state.drop_group(group)
    revoke(state, draft, group, expires_ms=expires_ms)
    value = {"group_id": row.group_id, "epoch": draft.revision}
    draft.emit("group.deleted", f"/groups/{group}", value)


def delete_group(state: State, command: DeleteGroup, draft: Draft) -> Any:
    actor = require_owner(state, draft, command.group, command.actor, "delete it")
    if isinstance(actor, Refused):
        return actor
    refused = refuse_revocations(state, draft, 1)
    if refused is not None:
        return refused
    _remove_group(state, draft, command.group, command.token_expiry_ms)
    return None


def request_join(state: State, command: RequestJoin, draft: Draft) -> Any:
    group, actor = command.group, command.actor
    if actor not in state.users:
        return draft.refuse(Code.DENIED, f"there is no user {quoted(actor)}", hint="Register first.")
    if group not in state.groups:
        return draft.refuse(Code.NOT_FOUND, f"there is no group {quoted(group)}", "group", _SEE_GROUPS)
    if state.members.get(group, actor) is not None:
        return draft.refuse(
            Code.CONFLICT, f"{quoted(actor)} is already a member of {quoted(group)}", hint=_SEE_MEMBERS
        )
    if state.join_requests.get(group, actor) is not None:
        return None
    if len(state.join_requests.rows(group)) >= limits.JOIN_REQUESTS_PER_GROUP_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"{limits.JOIN_REQUESTS_PER_GROUP_MAX} others wait to join {quoted(group)}",
            "group",
            "Try again when the admins have answered some of them.",
        )

    state.join_requests.put(group, actor, JoinRequest(command.at_ms, draft.revision))
    value = {"user": actor, "requested_at": rfc3339(command.at_ms)}
    draft.emit("request.added", f"/groups/{group}/join-requests/{actor}", value)
    return None


def _drop_request(state: State, draft: Draft, group: str, user: str, reason: str) -> None:
    state.join_requests.drop(group, user)
    draft.emit("request.removed", f"/groups/{group}/join-requests/{user}", {"reason": reason})


def withdraw_request(state: State, command: WithdrawRequest, draft: Draft) -> Any:
    if state.join_requests.get(command.group, command.actor) is None:
        return draft.refuse(
            Code.NOT_FOUND,
            f"{quoted(command.actor)} has not asked to join {quoted(command.group)}",
            hint=_SEE_GROUPS,
        )
    _drop_request(state, draft, command.group, command.actor, "withdrawn")
    return None


def _require_request(
    state: State, draft: Draft, group: str, user: str, actor: str, to: str
) -> JoinRequest | Refused:
    admin = require_admin(state, draft, group, actor, to)
    if isinstance(admin, Refused):
        return admin
    request = state.join_requests.get(group, user)
    if request is not None:
        return request
    if state.members.get(group, user) is not None:
        return draft.refuse(
            Code.CONFLICT, f"{quoted(user)} is already a member of {quoted(group)}", "user", _SEE_MEMBERS
        )
    return draft.refuse(
        Code.NOT_FOUND,
        f"{quoted(user)} has not asked to join {quoted(group)}",
        "user",
        "See who has: trimaran group requests GROUP",
    )


def accept_request(state: State, command: AcceptRequest, draft: Draft) -> Any:
    group, user = command.group, command.user
    request = _require_request(state, draft, group, user, command.actor, "accept a request")
    if isinstance(request, Refused):
        return request
    if len(state.members.rows(group)) >= limits.MEMBERS_PER_GROUP_MAX:
        return draft.refuse(
            Code.OVER_LIMIT, f"{quoted(group)} has {limits.MEMBERS_PER_GROUP_MAX} members already", "user"
        )

    _drop_request(state, draft, group, user, "accepted")
    member = Member("member", command.at_ms, draft.revision, draft.revision)
    _put_member(state, draft, "member.added", group, user, member)
    record(state, draft, group, command.at_ms, command.actor, "accept", user)
    return {"epoch": draft.revision}


def reject_request(state: State, command: RejectRequest, draft: Draft) -> Any:
    group, user = command.group, command.user
    request = _require_request(state, draft, group, user, command.actor, "reject a request")
    if isinstance(request, Refused):
        return request
    _drop_request(state, draft, group, user, "rejected")
    record(state, draft, group, command.at_ms, command.actor, "reject", user)
    return None


def _remove_member(
    state: State, draft: Draft, group: str, user: str, token_expiry_ms: int, reason: str
) -> None:
    user_leaves_swarms(state, draft, group, user, reason)
    state.members.drop(group, user)
    revoke(state, draft, group, user=user, expires_ms=token_expiry_ms)
    value = {"user": user, "epoch": draft.revision}
    draft.emit("member.removed", _member_path(group, user), value)


def _successor(state: State, group: str, owner: str) -> str:
    others = [(user, row) for user, row in state.members.rows(group).items() if user != owner]
    admins = [(row.role_epoch, user) for user, row in others if row.role == "admin"]
    return min(admins or [(row.epoch, user) for user, row in others])[1]


def leave_group(state: State, command: LeaveGroup, draft: Draft) -> Any:
    group, actor = command.group, command.actor
    member = require_member(state, draft, group, actor)
    if isinstance(member, Refused):
        return member
    refused = refuse_revocations(state, draft, 1)
    if refused is not None:
        return refused

    if len(state.members.rows(group)) == 1:
        assert member.role == "owner", "a group always has an owner"
        _remove_group(state, draft, group, command.token_expiry_ms)
        return {"owner": None}
    successor = _successor(state, group, actor) if member.role == "owner" else None
    _remove_member(state, draft, group, actor, command.token_expiry_ms, "left the group")
    record(state, draft, group, command.at_ms, actor, "leave", actor)
    if successor is not None:
        _make_owner(state, draft, group, successor)
        record(state, draft, group, command.at_ms, actor, "succeed", successor)
    row = state.groups.get(group)
    assert row is not None
    return {"owner": row.owner}


def _make_owner(state: State, draft: Draft, group: str, user: str) -> None:
    row = state.groups.get(group)
    assert row is not None
    state.put_group(group, replace(row, owner=user))
    _change_role(state, draft, group, user, "owner")


def kick_member(state: State, command: KickMember, draft: Draft) -> Any:
    group, user = command.group, command.user
    actor = require_admin(state, draft, group, command.actor, "remove a member")
    if isinstance(actor, Refused):
        return actor
    member = state.members.get(group, user)
    if member is None:
        return _not_in_group(draft, group, user)
    if user == command.actor:
        return draft.refuse(Code.CONFLICT, "nobody can remove oneself", "user", "Leave the group instead.")
    if RANKS[member.role] >= RANKS[actor.role]:
        return draft.refuse(
            Code.DENIED,
            f"{quoted(user)} is {member.role} of {quoted(group)}; an {actor.role} cannot remove them",
            "user",
            "Ask the owner of the group.",
        )
    refused = refuse_revocations(state, draft, 1)
    if refused is not None:
        return refused

    _remove_member(state, draft, group, user, command.token_expiry_ms, "removed from the group")
    record(state, draft, group, command.at_ms, command.actor, "kick", user)
    return {"epoch": draft.revision}


def promote_member(state: State, command: PromoteMember, draft: Draft) -> Any:
    group, user = command.group, command.user
    actor = require_owner(state, draft, group, command.actor, "make someone admin")
    if isinstance(actor, Refused):
        return actor
    member = state.members.get(group, user)
    if member is None:
        return _not_in_group(draft, group, user)
    if member.role != "member":
        return draft.refuse(Code.CONFLICT, f"{quoted(user)} is already {member.role}", "user", _SEE_MEMBERS)
    _change_role(state, draft, group, user, "admin")
    record(state, draft, group, command.at_ms, command.actor, "promote", user)
    return None


def demote_member(state: State, command: DemoteMember, draft: Draft) -> Any:
    """By the owner, or by the admin for oneself."""
    group, user = command.group, command.user
    actor = require_member(state, draft, group, command.actor)
    if isinstance(actor, Refused):
        return actor
    if actor.role == "member" or (actor.role == "admin" and user != command.actor):
        return draft.refuse(
            Code.DENIED,
            f"only the owner of group {quoted(group)} may take someone's role of admin",
            hint="Ask the owner of the group.",
        )
    member = state.members.get(group, user)
    if member is None:
        return _not_in_group(draft, group, user)
    if member.role == "owner":
        return draft.refuse(
            Code.CONFLICT, "the owner cannot be demoted", "user", "Transfer the group to another member."
        )
    if member.role != "admin":
        return draft.refuse(Code.CONFLICT, f"{quoted(user)} is not an admin", "user", _SEE_MEMBERS)
    _change_role(state, draft, group, user, "member")
    record(state, draft, group, command.at_ms, command.actor, "demote", user)
    return None


def transfer_group(state: State, command: TransferGroup, draft: Draft) -> Any:
    group, user = command.group, command.user
    actor = require_owner(state, draft, group, command.actor, "transfer it")
    if isinstance(actor, Refused):
        return actor
    if state.members.get(group, user) is None:
        return _not_in_group(draft, group, user)
    if user == command.actor:
        return draft.refuse(
            Code.CONFLICT, f"{quoted(user)} already owns {quoted(group)}", "user", _SEE_MEMBERS
        )
    refused = _owns_too_many(state, draft, user)
    if refused is not None:
        return refused
    _change_role(state, draft, group, command.actor, "admin")
    _make_owner(state, draft, group, user)
    record(state, draft, group, command.at_ms, command.actor, "transfer", user)
    return None
