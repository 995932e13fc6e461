"""What can go wrong when a tracker is asked, as a tree of exceptions.

    TrackerError            `message`, `code`, `outcome`, `hint`: enough to tell a person
    ├── ApiProblem          the cluster answered, and the answer is no; `problem` is the whole document.
    │   │                   4xx: nothing happened, and trying again changes nothing
    │   └── HistoryGone     410 on a watch: list again, then watch from the list's revision
    ├── Unavailable         nobody could be asked, or nobody could do it: certainly nothing happened
    └── UnknownOutcome      it may have happened and may still happen: nobody can tell from here.
                            For a write, repeating it with the same idempotency key is safe

`outcome` is "definite" or "indefinite". A definite error is never raised under indefinite conditions:
once any attempt of a call may have reached a tracker and its end was not learnt, refusals that do not go
through the replicated state (no leader, overloaded, session unknown) no longer make the call definite.
"""

from __future__ import annotations

from typing import Literal

from .types import Problem

Outcome = Literal["definite", "indefinite"]


class TrackerError(Exception):
    """Base of all; never raised itself."""

    def __init__(self, message: str, *, code: str, outcome: Outcome, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.outcome: Outcome = outcome
        self.hint = hint


class ApiProblem(TrackerError):
    """A problem document (RFC 9457). `status` is the HTTP status, `code` names the kind."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(
            problem.detail or problem.title,
            code=problem.code or problem.type.rsplit("/", 1)[-1],
            outcome=problem.outcome,
            hint=problem.hint,
        )
        self.problem = problem

    @property
    def status(self) -> int:
        return self.problem.status


class HistoryGone(ApiProblem):
    """The watch's `since` is older than what the trackers keep."""


class Unavailable(TrackerError):
    def __init__(self, message: str, *, code: str = "cluster-unavailable", hint: str = "") -> None:
        super().__init__(message, code=code, outcome="definite", hint=hint)


class UnknownOutcome(TrackerError):
    """`idempotency_key` is the write's ("" where the verb has none): repeat with it."""

    def __init__(self, message: str, *, idempotency_key: str = "", hint: str = "") -> None:
        super().__init__(message, code="outcome-unknown", outcome="indefinite", hint=hint)
        self.idempotency_key = idempotency_key
