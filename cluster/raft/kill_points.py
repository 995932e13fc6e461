"""Ends the process at a chosen step of disk work, so that tests can be as unkind as a power cut is.

Owned here: the environment variable `TRIMARAN_KILL_POINT=name[:nth]` and how a step is named:
`<area>.<step>.<before|after>`, and `<area>.append`, which leaves half of the data behind. The table is in
`docs/reference/kill-points.md`. Only the real disk asks here; without the variable a step costs one comparison.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLE = "TRIMARAN_KILL_POINT"
EXIT_STATUS = 137  # as after SIGKILL

_STEPS = {
    "journal": ("create", "append", "sync", "truncate", "remove"),
    "head": ("create", "truncate", "append", "sync", "rename"),
    "snapshot": ("create", "truncate", "append", "sync", "rename", "remove"),
    "receive": ("create", "truncate", "append", "sync", "remove"),
    "folder": ("sync",),
}
FOLDER = "folder"


def kill_point_names() -> list[str]:
    """Every name the variable accepts."""
    names = []
    for area, steps in _STEPS.items():
        for step in steps:
            if step == "append":
                names.append(f"{area}.append")
            names += [f"{area}.{step}.before", f"{area}.{step}.after"]
    return names


def area_of(file_name: str) -> str:
    if file_name == FOLDER:
        return FOLDER
    if file_name.startswith("journal.head"):
        return "head"
    if file_name.startswith("snapshot-"):
        return "receive" if file_name.endswith(".part") else "snapshot"
    return "journal"


class KillPoints:
    """At most one armed step; the process ends the `nth` time it is reached."""

    def __init__(self, name: str = "", nth: int = 1) -> None:
        if name and name not in kill_point_names():
            raise ValueError(f"{VARIABLE}: there is no kill point {name!r}")
        self._name = name
        self._left = nth

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> KillPoints:
        name, _, nth = environment.get(VARIABLE, "").partition(":")
        if nth and not nth.isdecimal():
            raise ValueError(f"{VARIABLE}: {nth!r} is no number")
        return cls(name, int(nth or 1))

    def before(self, file_name: str, step: str) -> None:
        if self._name:
            self._reach(f"{area_of(file_name)}.{step}.before")

    def after(self, file_name: str, step: str) -> None:
        if self._name:
            self._reach(f"{area_of(file_name)}.{step}.after")

    def torn(self, file_name: str, step: str, descriptor: int, data: bytes | bytearray) -> None:
        """Reached before a write: `<area>.<step>` leaves the first half of the data behind."""
        if not self._name:
            return
        self._reach(f"{area_of(file_name)}.{step}.before")
        if self._due(f"{area_of(file_name)}.{step}"):
            os.write(descriptor, data[: len(data) // 2])
            self._end()

    def _reach(self, name: str) -> None:
        if self._due(name):
            self._end()

    def _due(self, name: str) -> bool:
        if name != self._name:
            return False
        self._left -= 1
        return self._left == 0

    @staticmethod
    def _end() -> None:
        os._exit(EXIT_STATUS)
