"""What a checker says: it held, it was violated, or it could not tell. Running out of time is `unknown`,
never a pass."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Verdict(Struct, kw_only=True):
    name: str
    result: Literal["held", "violated", "unknown"]
    checked: int  # how much evidence there was; a check of nothing says so
    message: str = ""
    first_bad_ns: int | None = None
    operations: list[int] = []  # ids of the operations that show it


def held(name: str, checked: int, message: str = "") -> Verdict:
    return Verdict(name=name, result="held", checked=checked, message=message)


def violated(
    name: str,
    checked: int,
    message: str,
    first_bad_ns: int | None = None,
    operations: list[int] | None = None,
) -> Verdict:
    return Verdict(
        name=name, result="violated", checked=checked, message=message, first_bad_ns=first_bad_ns,
        operations=operations or [],
    )  # fmt: skip
