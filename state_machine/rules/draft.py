"""What a rule writes while it works: the events of its revision, and whether anything changed.

Owned here: the promise of `machine.py` to the rules. A rule first checks everything, returning
`draft.refuse(...)` at the first fault; then it changes the state, calling `emit` or `touch`; then it
returns the value of its answer.
"""

from __future__ import annotations

from typing import Any

from state_machine.events import Event
from state_machine.model import State
from state_machine.outcomes import Code, Refused


class Draft:
    """The next revision of a state, in the making."""

    __slots__ = ("changed", "events", "revision", "watched")

    def __init__(self, state: State, *, watched: bool) -> None:
        self.revision = state.revision + 1  # it becomes the state's if anything changes
        self.changed = False
        self.watched = watched  # False: nobody takes events, so values need not be built
        self.events: list[Event] = []

    def touch(self) -> None:
        """Something changed that has no event."""
        self.changed = True

    def emit(self, type_: str, path: str, value: dict[str, Any]) -> None:
        self.changed = True
        self.events.append(Event(type_, path, value))

    def refuse(self, code: Code, message: str, field: str = "", hint: str = "") -> Refused:
        assert not self.changed, "check everything first, then change: there are no partial effects"
        return Refused(code, message, field, hint, self.revision - 1)
