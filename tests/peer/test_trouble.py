"""What trackers refuse, or do not answer, in a person's words."""

from __future__ import annotations

import pytest

from cluster.api import problems
from cluster.api.errors import ApiProblem, TrackerError, UnknownOutcome
from cluster.api.types import Problem
from peer.reports import Exit
from peer.trouble import of_tracker


def problem(kind: problems.Kind, hint: str = "", retry_after_seconds: float | None = None) -> ApiProblem:
    return ApiProblem(
        Problem(
            type=kind.type,
            title=kind.title,
            status=kind.status,
            detail="the detail",
            outcome=kind.outcome,
            hint=hint or kind.advice,
            code=kind.code,
            retry_after_seconds=retry_after_seconds,
        )
    )


@pytest.mark.parametrize("kind", problems.KINDS.values(), ids=lambda kind: kind.code)
def test_no_person_is_told_of_headers(kind: problems.Kind) -> None:
    told = of_tracker(problem(kind))
    assert told.message == "The detail."
    assert told.outcome == kind.outcome
    assert told.exit_code is not Exit.DONE
    if kind not in (problems.METHOD_NOT_ALLOWED, problems.REQUEST_MISMATCH, problems.UNSUPPORTED_MEDIA_TYPE):
        for word in ("Idempotency-Key", "retry_after_seconds", "openapi", "header", "field"):
            assert word not in told.hint, kind.code


@pytest.mark.parametrize(
    ("error", "exit_code", "hint"),
    [
        (
            UnknownOutcome("the trackers could not say", idempotency_key="k", hint="about keys"),
            Exit.CLUSTER_UNAVAILABLE,
            "Run the same command again: it is not done twice.",
        ),
        (
            UnknownOutcome("the trackers could not say", hint="look before trying again"),
            Exit.CLUSTER_UNAVAILABLE,
            "Look before trying again.",
        ),
        (
            problem(problems.RATE_LIMITED, retry_after_seconds=41.6),
            Exit.DENIED,
            "Wait 42 seconds, then try again.",
        ),
        (problem(problems.INVALID, "Choose another name."), Exit.USAGE, "Choose another name."),
    ],
)
def test_the_next_step(error: TrackerError, exit_code: Exit, hint: str) -> None:
    told = of_tracker(error)
    assert (told.exit_code, told.hint) == (exit_code, hint)
    assert told.message.endswith(".")
