"""The replicated application of the simulation: small, strict, and easy to compare.

Owned here: puts with request ids, bumps without, refusals; a chain over everything applied, so that two replicas at
one revision either agree on the whole past or show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias
from zlib import crc32

import msgspec

Command: TypeAlias = tuple[str, str, str, str]
"""(kind, request id or "", key, value); kinds: put, bump, refuse."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, str, str, str]).decode


class _State(msgspec.Struct, array_like=True):
    revision: int = 0
    chain: int = 0
    values: dict[str, str] = {}
    outcomes: dict[str, int] = {}


_decode_state = msgspec.msgpack.Decoder(_State).decode


def encode_command(command: Command) -> bytes:
    return _encode(command)


class SimulatedReplica:
    """`remembers` and `refuses_by_value` are the application's share of the corrections (14 and 12)."""

    def __init__(
        self,
        applied: Callable[[int, int, bytes], None],
        applied_twice: Callable[[str], None],
        *,
        remembers: bool = True,
        refuses_by_value: bool = True,
    ) -> None:
        self.state = _State(0, 0, {}, {})
        self._applied = applied
        self._applied_twice = applied_twice
        self._remembers = remembers
        self._refuses_by_value = refuses_by_value

    def apply(self, commands: Sequence[bytes]) -> list[Any]:
        return [self._apply(command) for command in commands]

    def _apply(self, command: bytes) -> Any:
        state = self.state
        try:
            kind, request, key, value = _decode(command)
        except msgspec.DecodeError:
            return "unreadable"
        if kind == "refuse":
            if not self._refuses_by_value:
                raise KeyError(key)
            return "refused"
        if request and request in state.outcomes:
            if self._remembers:
                return state.outcomes[request]
            self._applied_twice(request)
        state.revision += 1
        state.chain = crc32(command, state.chain)
        state.values[key] = value if kind == "put" else state.values.get(key, "") + "+"
        if request:
            state.outcomes[request] = state.revision
        self._applied(state.revision, state.chain, command)
        return state.revision

    def freeze(self) -> _Frozen:
        state = self.state
        return _Frozen(_encode((state.revision, state.chain, state.values, state.outcomes)))

    def loader(self) -> _Loader:
        return _Loader(self)

    def digest(self) -> bytes:
        """Of the whole state, not only of the chain: what a snapshot brought counts too."""
        return crc32(_encode(self.state)).to_bytes(4, "little")


class _Frozen:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def slices(self) -> Iterator[bytes]:
        for at in range(0, len(self._data), 700):
            yield self._data[at : at + 700]


class _Loader:
    def __init__(self, replica: SimulatedReplica) -> None:
        self._replica = replica
        self._data = bytearray()
        self._undone = 0

    def feed(self, data: bytes) -> None:
        self._data += data
        self._undone = 2

    def work(self) -> bool:
        self._undone -= self._undone > 0
        return self._undone > 0

    def finish(self) -> None:
        try:
            self._replica.state = _decode_state(bytes(self._data))
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from error
