"""The verbs of `PeerSession` over the control socket, both ends, made from the protocol's own signatures.

Owned here: what a call's arguments and its answer are on the wire: the parameters and the return type of the protocol's
method, by name. A verb that is added to the protocol is here without another line. Left to others: the frames
(`control.py`), what the verbs do (`session.py`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, cast, get_type_hints

import msgspec

from . import control
from .home import Home
from .reports import Exit, OnProgress, PeerSession, TrimaranError

_NOT_CALLED: Final = frozenset({"close", "serve_forever"})  # of each end by itself
_PROGRESS: Final = "on_progress"


class _Verb:
    """One method of the protocol."""

    def __init__(self, name: str) -> None:
        method = vars(PeerSession)[name]
        hints = get_type_hints(method)
        self.name = name
        self.result: Any = hints.pop("return")
        self.reports = hints.pop(_PROGRESS, None) is not None
        self.signature = inspect.signature(method)
        defaults = {each.name: each.default for each in self.signature.parameters.values()}
        self.arguments = msgspec.defstruct(
            f"{name}_arguments",
            [
                (each, hint) if defaults[each] is inspect.Parameter.empty else (each, hint, defaults[each])
                for each, hint in hints.items()
            ],
            kw_only=True,
        )

    def packed(self, *positional: Any, **named: Any) -> tuple[dict[str, Any], OnProgress | None]:
        """What a caller gave, as it goes over the wire, and whom progress is told to."""
        given = self.signature.bind(None, *positional, **named).arguments
        del given["self"]
        on_progress = given.pop(_PROGRESS, None)
        return msgspec.to_builtins(given, enc_hook=_path_to_wire), on_progress

    def unpacked(self, given: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """The method's keyword arguments. Raises msgspec.ValidationError."""
        values = msgspec.convert(given, self.arguments, dec_hook=_path_from_wire)
        named = {each: getattr(values, each) for each in self.arguments.__struct_fields__}
        return {**named, _PROGRESS: on_progress} if self.reports else named


@functools.cache
def _verb(name: str) -> _Verb | None:
    method = vars(PeerSession).get(name)
    return _Verb(name) if inspect.iscoroutinefunction(method) and name not in _NOT_CALLED else None


def _path_to_wire(value: Any) -> Any:
    assert isinstance(value, Path)
    return str(value.expanduser().absolute())  # the other process stands in another folder


def _path_from_wire(kind: type, value: Any) -> Any:
    return kind(value)


async def perform(session: PeerSession, name: str, given: dict[str, Any], on_progress: OnProgress) -> Any:
    """The running peer's end: do what a command asks for."""
    verb = _verb(name)
    try:
        if verb is None:
            raise msgspec.ValidationError(f"there is no verb {name}")
        named = verb.unpacked(given, on_progress)
    except msgspec.ValidationError as error:
        raise TrimaranError(
            f"The running peer does not understand {name!r}: it is of another version. Nothing was done.",
            exit_code=Exit.USAGE,
            code="other-version",
            hint="Stop it, and start it again with this version.",
        ) from error
    return await getattr(session, name)(**named)


def remote_session(home: Home) -> PeerSession:
    """The peer that runs in the home."""
    return cast(PeerSession, _Remote(home))


class _Remote:
    """A command's end."""

    remote = True
    listen_address = ""  # the running peer has said its own

    def __init__(self, home: Home) -> None:
        self._home = home

    async def close(self) -> None:
        """Nothing is held."""

    async def serve_forever(self, on_ready: Callable[[], None] | None = None) -> None:
        """The running peer serves already, and goes on when this command ends."""
        if on_ready is not None:
            on_ready()

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        verb = _verb(name)
        if verb is None:
            raise AttributeError(name)
        return functools.partial(self._call, verb)

    async def _call(self, verb: _Verb, /, *positional: Any, **named: Any) -> Any:
        given, on_progress = verb.packed(*positional, **named)
        try:
            return await control.call(self._home.socket, verb.name, given, verb.result, on_progress)
        except ConnectionError as error:
            raise TrimaranError(
                "The peer that ran in this home has ended. Nothing was done.",
                exit_code=Exit.UNFINISHED,
                code="peer-ended",
                hint="Run the command again.",
            ) from error
