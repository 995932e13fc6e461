"""Who may. Owned here: membership before existence, so that a stranger learns nothing.

For a group that does not exist, a stranger gets the very answer of a stranger to one that does.
"""

from __future__ import annotations

from typing import Final

from state_machine.model import Member, State
from state_machine.names import quoted
from state_machine.outcomes import Code, Refused

from .draft import Draft

RANKS: Final = {"member": 0, "admin": 1, "owner": 2}


def require_member(state: State, draft: Draft, group: str, actor: str) -> Member | Refused:
    member = state.members.get(group, actor)
    if member is None:
        return draft.refuse(
            Code.DENIED,
            f"{quoted(actor)} is not a member of group {quoted(group)}",
            hint="Ask to join the group, and wait until an admin accepts.",
        )
    return member


def require_admin(state: State, draft: Draft, group: str, actor: str, to: str) -> Member | Refused:
    member = require_member(state, draft, group, actor)
    if isinstance(member, Member) and member.role == "member":
        return draft.refuse(
            Code.DENIED,
            f"only an admin or the owner of group {quoted(group)} may {to}",
            hint="Ask an admin of the group.",
        )
    return member


def require_owner(state: State, draft: Draft, group: str, actor: str, to: str) -> Member | Refused:
    member = require_member(state, draft, group, actor)
    if isinstance(member, Member) and member.role != "owner":
        return draft.refuse(
            Code.DENIED,
            f"only the owner of group {quoted(group)} may {to}",
            hint="Ask the owner of the group.",
        )
    return member
