"""Users and sessions."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from cluster.api import problems as kinds
from cluster.api import types as t
from cluster.api.tokens import SessionClaims
from cluster.auth import invitation_hash, new_invitation, unauthenticated
from cluster.call import Call
from cluster.problems import ProblemError
from state_machine import queries
from state_machine.commands import ChangePassword, CreateInvitation, RegisterUser, RevokeSession, SetPolicy
from state_machine.moments import rfc3339
from state_machine.requests import request_key

if TYPE_CHECKING:
    from cluster.service import Service


async def register(service: Service, call: Call) -> t.RegisterAnswer:
    body: t.RegisterBody = call.body
    password_hash = await service.passwords.hash(body.password, user=body.user, request_id=call.request_id)
    command = RegisterUser(
        body.user,
        password_hash,
        service.wall_ms(),
        invitation_hash(body.invitation) if body.invitation else "",
    )
    # An invitation is a secret as long as it is unused: its hash stands for it.
    secret_fields = {"password": password_hash, "invitation": command.invitation_hash}
    request_hash = call.request_hash(secret_fields)
    outcome = await service.write(call, command, caller=body.user, request_hash=request_hash)
    return t.RegisterAnswer(user=body.user, revision=outcome.revision)


async def login(service: Service, call: Call) -> t.SessionAnswer:
    """Nothing is written: a session is a signed statement, and repeating a sign-in makes another one."""
    body: t.SessionBody = call.body
    service.attempts.begin(body.user, call.address)
    await service.barrier()
    state = service.machine.state
    password_hash, epoch = queries.password_hash(state, body.user), queries.session_epoch(state, body.user)
    if not await service.passwords.verify(body.password, password_hash) or epoch is None:
        raise ProblemError(kinds.BAD_CREDENTIALS, "The user or the password is wrong.")
    service.attempts.succeeded(body.user, call.address)
    require_key(service)
    now_ms = service.wall_ms()
    claims = SessionClaims(
        user=body.user,
        session_id=secrets.token_urlsafe(18),
        epoch=epoch,
        issued_at_ms=now_ms,
        expires_at_ms=now_ms + round(service.settings.session_seconds * 1000),
    )
    return t.SessionAnswer(
        user=body.user,
        session=service.keys.sign_session(claims),
        expires_at=rfc3339(claims.expires_at_ms),
    )


def require_key(service: Service) -> None:
    if not service.keys.ready:
        raise ProblemError(
            kinds.UNAVAILABLE,
            "This node has just started: its signing key is not known to the cluster yet.",
            retry_after_seconds=0.5,
        )


async def logout(service: Service, call: Call) -> t.Done:
    """Ending a session that has been ended is done already."""
    if not service.sessions.lives(call.session):
        return t.Done()
    session = call.session
    command = RevokeSession(session.user, session.session_id, session.expires_at_ms)
    outcome = await service.write(call, command)
    return t.Done(revision=outcome.revision)


async def whoami(service: Service, call: Call) -> t.WhoAnswer:
    await service.fresh(call)
    return t.WhoAnswer(user=call.user)


async def change_password(service: Service, call: Call) -> t.Done:
    """All sessions end, this one too. So a repetition comes with an ended session and an old password
    that no longer is one: it is let through to the machine, which answers it from memory."""
    body: t.PasswordBody = call.body
    await service.barrier()
    state = service.machine.state
    repeated = state.requests.find(request_key(call.user, call.request_id)) is not None
    if not repeated:
        if not service.sessions.lives(call.session):
            raise unauthenticated("The session was ended, by signing out or by a change of password.")
        service.attempts.begin(call.user, call.address)
        if not await service.passwords.verify(body.password, queries.password_hash(state, call.user)):
            raise ProblemError(kinds.BAD_CREDENTIALS, "The present password is wrong.", field="password")
        service.attempts.succeeded(call.user, call.address)
    password_hash = await service.passwords.hash(
        body.new_password, user=call.user, request_id=call.request_id
    )
    command = ChangePassword(call.user, password_hash, service.wall_ms())
    request_hash = call.request_hash({"password": "", "new_password": password_hash})
    outcome = await service.write_repeatable(call, command, request_hash)
    return t.Done(revision=outcome.revision)


async def reset_password(service: Service, call: Call) -> t.Done:
    """By an operator, who need not know the present one. All of the user's sessions end."""
    body: t.ResetBody = call.body
    user = call.params["user"]
    password_hash = await service.passwords.hash(body.new_password, user=user, request_id=call.request_id)
    command = ChangePassword(user, password_hash, service.wall_ms())
    request_hash = call.request_hash({"new_password": password_hash})
    outcome = await service.write(call, command, request_hash=request_hash)
    return t.Done(revision=outcome.revision)


async def set_policy(service: Service, call: Call) -> t.Done:
    body: t.PolicyBody = call.body
    outcome = await service.write_own(SetPolicy(body.registration))
    return t.Done(revision=outcome.revision)


async def create_invitation(service: Service, call: Call) -> t.InvitationAnswer:
    body: t.InvitationBody = call.body
    if not 0 < body.valid_seconds <= 365 * 86_400:
        raise ProblemError(
            kinds.INVALID, "valid_seconds must be from 1 to a year's 31536000.", field="valid_seconds"
        )
    code, code_hash = new_invitation()
    command = CreateInvitation(code_hash, service.wall_ms() + body.valid_seconds * 1000)
    outcome = await service.write_own(command)
    return t.InvitationAnswer(invitation=code, revision=outcome.revision)


HANDLERS = (register, login, logout, whoami, change_password, reset_password, set_policy, create_invitation)
