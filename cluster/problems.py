"""Refusals as exceptions, and their way into problem documents (RFC 9457).

Owned here: the one exception handlers raise to refuse, and how outcomes of the state machine and of
proposals map to it. The kinds are `cluster/api/problems.py`'s.
"""

from __future__ import annotations

from typing import Any

from cluster import consensus
from cluster.api import problems as kinds
from cluster.api.problems import Kind
from state_machine.outcomes import Code, Refused


class ProblemError(Exception):
    """Raised wherever a request is refused; becomes the answer as it stands. `detail` and `hint` are for
    people, and hold nothing secret."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        field: str = "",
        hint: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.field = field
        self.hint = hint or kind.advice
        self.retry_after_seconds = retry_after_seconds

    def document(self, envelope: dict[str, Any]) -> dict[str, Any]:
        document: dict[str, Any] = {
            "type": self.kind.type,
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
            "outcome": self.kind.outcome,
            "hint": self.hint,
            "field": self.field,
            "code": self.kind.code,
            "retry_after_seconds": self.retry_after_seconds,
        }
        document.update(envelope)
        return document


_BY_CODE: dict[Code, Kind] = {
    Code.MALFORMED: kinds.INVALID,
    Code.INVALID: kinds.INVALID,
    Code.OVER_LIMIT: kinds.OVER_LIMIT,
    Code.NOT_FOUND: kinds.NOT_FOUND,
    Code.DENIED: kinds.DENIED,
    Code.CONFLICT: kinds.CONFLICT,
    Code.REQUEST_MISMATCH: kinds.REQUEST_MISMATCH,
    Code.REQUEST_TOO_OLD: kinds.REQUEST_TOO_OLD,
    Code.UNSUPPORTED: kinds.UNSUPPORTED,
}
assert _BY_CODE.keys() == set(Code), "every refusal of the machine has a problem"

_BY_REFUSAL: dict[consensus.Refusal, Kind] = {
    consensus.Refusal.NO_LEADER: kinds.UNAVAILABLE,
    consensus.Refusal.DISK_FULL: kinds.DISK_FULL,
    consensus.Refusal.OVERLOADED: kinds.OVERLOADED,
    consensus.Refusal.STOPPING: kinds.UNAVAILABLE,
    consensus.Refusal.TOO_LARGE: kinds.TOO_LARGE,
    consensus.Refusal.NOT_A_MEMBER: kinds.UNAVAILABLE,
}
assert _BY_REFUSAL.keys() == set(consensus.Refusal), "every refused proposal has a problem"

_REFUSAL_DETAIL: dict[consensus.Refusal, str] = {
    consensus.Refusal.NO_LEADER: "The cluster has no leader at the moment; nothing was done.",
    consensus.Refusal.DISK_FULL: "The disk of the leader, or of a majority of the nodes, is full; nothing was done.",
    consensus.Refusal.OVERLOADED: "Too many changes are waiting; nothing was done.",
    consensus.Refusal.STOPPING: "This node is stopping; nothing was done.",
    consensus.Refusal.TOO_LARGE: "The change is larger than an entry of the log may be; nothing was done.",
    consensus.Refusal.NOT_A_MEMBER: "This node is not (or no longer) a member of the cluster; nothing was done.",
}


def of_refused(refused: Refused) -> ProblemError:
    return ProblemError(_BY_CODE[refused.code], refused.message, field=refused.field, hint=refused.hint)


def of_rejected(rejected: consensus.Rejected) -> ProblemError:
    kind = _BY_REFUSAL[rejected.refusal]
    return ProblemError(
        kind, _REFUSAL_DETAIL[rejected.refusal], retry_after_seconds=0.2 if kind.retry else None
    )


def of_unknown(unknown: consensus.Unknown) -> ProblemError:
    del unknown  # its words are about Raft, not about what the caller asked
    return ProblemError(
        kinds.OUTCOME_UNKNOWN,
        "The cluster did not confirm in time; the change may or may not take effect.",
        retry_after_seconds=0.2,
    )


def of_barrier() -> ProblemError:
    return ProblemError(
        kinds.UNAVAILABLE,
        "The node could not confirm with a majority that what it knows is the latest; nothing was done.",
        retry_after_seconds=0.2,
    )
