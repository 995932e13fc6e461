"""Users, their passwords and sessions, and who may register.

Passwords arrive hashed; sessions are made and signed by nodes. Here is only what all nodes must agree
on: the hash, the epoch below which sessions are void, and the sessions ended before their time.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from state_machine import limits
from state_machine.commands import ChangePassword, CreateInvitation, RegisterUser, RevokeSession, SetPolicy
from state_machine.model import Invitation, RevokedSession, State, User
from state_machine.names import is_manifest_id, name_fault, quoted
from state_machine.outcomes import Code, Refused

from .draft import Draft

SESSION_ID_CHARS_MAX = 128


def _password_hash_fault(draft: Draft, password_hash: str) -> Refused | None:
    if not password_hash:
        return draft.refuse(Code.INVALID, "the password's hash is empty", "password")
    if len(password_hash) > limits.PASSWORD_HASH_CHARS_MAX:
        return draft.refuse(Code.OVER_LIMIT, "the password's hash is too long", "password")
    return None


def _no_user(draft: Draft, user: str) -> Refused:
    return draft.refuse(Code.NOT_FOUND, f"there is no user {quoted(user)}", "user", "Register first.")


def register_user(state: State, command: RegisterUser, draft: Draft) -> Any:
    if state.registration == "invitation":
        invitation = state.invitations.get(command.invitation_hash)
        if invitation is None or command.at_ms >= invitation.expires_ms:
            return draft.refuse(
                Code.DENIED,
                "registration needs an invitation, and this one is missing, used or expired",
                "invitation",
                "Ask an operator of the cluster for a new invitation.",
            )
    fault = name_fault(command.user, "user name")
    if fault is not None:
        return draft.refuse(Code.INVALID, fault, "user", "Choose another name.")
    if len(command.user) > limits.USER_NAME_CHARS_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"the user name has {len(command.user)} characters, more than {limits.USER_NAME_CHARS_MAX}",
            "user",
            "Choose a shorter name.",
        )
    refused = _password_hash_fault(draft, command.password_hash)
    if refused is not None:
        return refused
    if command.user in state.users:
        return draft.refuse(
            Code.CONFLICT,
            f"the user name {quoted(command.user)} is taken",
            "user",
            "Choose another name; or sign in if it is yours: trimaran login USER",
        )
    if len(state.users) >= limits.USERS_MAX:
        return draft.refuse(Code.OVER_LIMIT, f"the cluster has {limits.USERS_MAX} users already", "user")

    if state.registration == "invitation":
        state.invitations.drop(command.invitation_hash)
    state.users.put(command.user, User(command.password_hash, 1, command.at_ms))
    draft.emit("user.registered", f"/users/{command.user}", {})
    return {"user": command.user}


def change_password(state: State, command: ChangePassword, draft: Draft) -> Any:
    user = state.users.get(command.user)
    if user is None:
        return _no_user(draft, command.user)
    refused = _password_hash_fault(draft, command.password_hash)
    if refused is not None:
        return refused

    epoch = user.session_epoch + 1
    state.users.put(command.user, replace(user, password_hash=command.password_hash, session_epoch=epoch))
    state.revoked_sessions.drop_all(command.user)  # the epoch voids them all
    draft.emit("user.sessions_voided", f"/users/{command.user}/sessions", {"session_epoch": epoch})
    return {"session_epoch": epoch}


def revoke_session(state: State, command: RevokeSession, draft: Draft) -> Any:
    if command.user not in state.users:
        return _no_user(draft, command.user)
    if not 0 < len(command.session_id) <= SESSION_ID_CHARS_MAX:
        return draft.refuse(
            Code.INVALID, f"a session's id has 1 to {SESSION_ID_CHARS_MAX} characters", "session_id"
        )
    if state.revoked_sessions.get(command.user, command.session_id) is not None:
        return None
    if len(state.revoked_sessions) >= limits.REVOKED_SESSIONS_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            "too many sessions were ended before their time",
            hint="Change the password: that ends all sessions at once. Or try again in some hours.",
        )

    state.revoked_sessions.put(command.user, command.session_id, RevokedSession(command.expires_ms))
    draft.emit("session.revoked", f"/users/{command.user}/sessions", {"session_id": command.session_id})
    return None


def set_policy(state: State, command: SetPolicy, draft: Draft) -> Any:
    if state.registration != command.registration:
        state.registration = command.registration
        draft.touch()
    return None


def create_invitation(state: State, command: CreateInvitation, draft: Draft) -> Any:
    if not is_manifest_id(command.invitation_hash):
        return draft.refuse(
            Code.INVALID, "an invitation is known by a SHA-256 in hex: 64 characters", "invitation_hash"
        )
    if command.invitation_hash in state.invitations:
        return draft.refuse(Code.CONFLICT, "this invitation exists already", "invitation_hash")
    if len(state.invitations) >= limits.INVITATIONS_MAX:
        return draft.refuse(
            Code.OVER_LIMIT,
            f"{limits.INVITATIONS_MAX} invitations wait to be used",
            hint="Wait until some were used or have expired.",
        )
    state.invitations.put(command.invitation_hash, Invitation(command.expires_ms))
    draft.touch()
    return None
