"""Registering, signing in and out, and passwords."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import Parameter

from cluster.api.types import PASSWORD_CHARS_MIN
from peer.reports import TrimaranError, WhoReport
from trimaran.output import Output
from trimaran.settings import DEFAULTS, Common, a_name, remember_trackers, usage
from trimaran.terminal import secret
from trimaran.wiring import peer_session, sign_in

User = Annotated[str, Parameter(help="The user's name.", validator=a_name)]
PasswordStdin = Annotated[bool, Parameter(help="Read the password from the first line of stdin.")]


async def register(
    user: User,
    /,
    *,
    password_stdin: PasswordStdin = False,
    invitation: Annotated[str, Parameter(help="Where the cluster registers by invitation only.")] = "",
    common: Common = DEFAULTS,
) -> None:
    """Make an account, and sign in with it on this peer.

    The password is asked for, or taken from TRIMARAN_PASSWORD or --password-stdin; it is never an argument.
    """
    async with peer_session(common) as session:
        password = _new(await _password(password_stdin, twice=True))
        await session.register(user, password, invitation)
        try:
            who = await session.login(user, password)
        except TrimaranError as error:
            raise TrimaranError(
                f"The account {user} is made, but signing in failed: {error.message}",
                exit_code=error.exit_code,
                code=error.code,
                outcome=error.outcome,
                hint=error.hint,
            ) from error
        _welcome(common, who, "Registered and signed in")


async def login(user: User, /, *, password_stdin: PasswordStdin = False, common: Common = DEFAULTS) -> None:
    """Sign in on this peer. What it shared before, it shares again."""
    async with peer_session(common) as session:
        password = await _password(password_stdin)
        _welcome(common, await session.login(user, password), "Signed in")


async def logout(*, common: Common = DEFAULTS) -> None:
    """Sign out: the session ends, and this peer stops sharing."""
    async with peer_session(common) as session:
        revision = await session.logout()
    Output.of(common).answer({"revision": revision}, "Signed out.")


async def whoami(*, common: Common = DEFAULTS) -> None:
    """Tell who is signed in on this peer."""
    async with peer_session(common) as session:
        who = await session.whoami()
    Output.of(common).answer(who, f"{who.user} (peer {who.peer_id})")


async def passwd(*, password_stdin: PasswordStdin = False, common: Common = DEFAULTS) -> None:
    """Change the password. All other sessions of the account end.

    The present one is asked for, or taken from TRIMARAN_PASSWORD, the new one from TRIMARAN_NEW_PASSWORD; with
    --password-stdin they are the first two lines.
    """
    async with peer_session(common) as session:
        sign_in(common)  # who is not signed in need not type
        password = await _password(password_stdin, prompt="Present password: ")
        new = await new_password(password_stdin)
        revision = await session.change_password(password, new)
    Output.of(common).answer({"revision": revision}, "The password is changed.")


async def new_password(from_stdin: bool) -> str:
    """As the present one is taken, but typed twice. Raises `TrimaranError`."""
    return _new(
        await _password(from_stdin, variable="TRIMARAN_NEW_PASSWORD", prompt="New password: ", twice=True)
    )


def _new(password: str) -> str:
    if len(password) < PASSWORD_CHARS_MIN:
        usage(
            f"A password has at least {PASSWORD_CHARS_MIN} characters; this one has {len(password)}.",
            "Nothing was done. Choose a longer one.",
        )
    return password


def _welcome(common: Common, who: WhoReport, what: str) -> None:
    out = Output.of(common)
    if (written := remember_trackers(common)) is not None:
        out.note(f"The trackers are remembered in {written}.")
    out.answer(who, f"{what} as {who.user}; this is peer {who.peer_id}.")


async def _password(
    from_stdin: bool, *, variable: str = "TRIMARAN_PASSWORD", prompt: str = "Password: ", twice: bool = False
) -> str:
    """From stdin, the environment, or a prompt, in that order. Raises `TrimaranError`."""
    if from_stdin:
        line = sys.stdin.readline()
        if not line.rstrip("\r\n"):
            usage("No password came on stdin.", "Pipe it in, followed by a line break.")
        return line.rstrip("\r\n")
    if (given := os.environ.get(variable)) is not None:
        return given
    if not sys.stdin.isatty():
        usage("There is no terminal to ask for the password.", f"Set {variable}, or use --password-stdin.")
    try:
        password = await secret(prompt)
        if twice and await secret("The same again: ") != password:
            usage("The two passwords differ.", "Try again.")
    except EOFError:
        usage("No password was typed.", "Nothing was done. Type it, or use --password-stdin.")
    return password
