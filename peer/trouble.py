"""What the trackers' refusals and silences, and the system's, are to a person at a peer: `TrimaranError`s."""

from __future__ import annotations

import errno
import re
from typing import Final

from cluster.api import problems
from cluster.api.errors import ApiProblem, TrackerError, Unavailable, UnknownOutcome

from .reports import Exit, TrimaranError

_BY_CODE: Final = {
    "over-limit": Exit.CONFLICT,
    "request-mismatch": Exit.CONFLICT,
    "request-too-old": Exit.CONFLICT,
    "rate-limited": Exit.DENIED,
    "internal": Exit.UNEXPECTED,
    "no-trackers": Exit.USAGE,
    "bad-tracker-url": Exit.USAGE,
    "insecure-tracker": Exit.USAGE,
}
_BY_STATUS: Final = {
    400: Exit.USAGE,
    401: Exit.DENIED,
    403: Exit.DENIED,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    413: Exit.USAGE,
    415: Exit.USAGE,
    422: Exit.USAGE,
    501: Exit.USAGE,
}
# Advice that is about HTTP, as it helps a person: of some kinds always, of others where they say nothing better.
_ADVICE_OF: Final = {
    "outcome-unknown": "Run the same command again: it is not done twice.",
    "request-too-old": "See what is there now, and run the command again if it is still wanted.",
    "overloaded": "Try again in a moment.",
}
_FOR_PEOPLE: Final = {
    problems.INVALID.advice: "Correct it and try again. Nothing was done.",
    problems.NO_SUCH_ROUTE.advice: "Check the names. Nothing was done.",
    problems.INTERNAL.advice: "See what is there now, and run the command again if it is still wanted; the "
    "tracker's log has the details.",
}


def of_tracker(error: TrackerError) -> TrimaranError:
    """The same error in the front door's terms."""
    code = _BY_CODE.get(error.code)
    if code is None:
        status = error.status if isinstance(error, ApiProblem) else 0
        code = _BY_STATUS.get(status, Exit.CLUSTER_UNAVAILABLE)
    hint = sentence(_hint(error))
    if not hint and code is Exit.CLUSTER_UNAVAILABLE:
        hint = "Look at the nodes with: trimaran cluster status"
    message = sentence(error.message)
    return TrimaranError(message, exit_code=code, code=error.code, outcome=error.outcome, hint=hint)


def _hint(error: TrackerError) -> str:
    if isinstance(error, ApiProblem) and error.code == "rate-limited":
        seconds = error.problem.retry_after_seconds
        return (
            f"Wait {seconds:.0f} seconds, then try again."
            if seconds
            else "Wait some minutes, then try again."
        )
    if isinstance(error, UnknownOutcome) and not error.idempotency_key:
        return error.hint  # nothing keeps it from being done twice
    return _ADVICE_OF.get(error.code, _FOR_PEOPLE.get(error.hint, error.hint))


def sentence(text: str) -> str:
    """With a capital letter and an end, as all that a person reads. Quoted names and addresses are left alone."""
    text = text.strip()
    if re.match(r"[a-z]+([ ,;']|: )", text):
        text = text[0].upper() + text[1:]
    # A command at the end is to be copied: no full stop behind it.
    copied = "trimaran " in text.partition(": ")[2]
    return text if not text or text[-1] in ".!?" or copied else f"{text}."


def refused(error: TrackerError) -> bool:
    """The trackers said no: asking again changes nothing."""
    return (
        isinstance(error, ApiProblem)
        and error.status < 500
        and error.code not in ("rate-limited", "too-slow")
    )


def away(error: TrackerError) -> bool:
    """Nobody could be asked, or nobody knows what came of it."""
    return isinstance(error, Unavailable | UnknownOutcome) or (
        isinstance(error, ApiProblem) and error.status >= 500
    )


def not_signed_in() -> TrimaranError:
    return TrimaranError(
        "Nobody is signed in on this peer.",
        exit_code=Exit.DENIED,
        code="unauthenticated",
        hint="Sign in: trimaran login USER (or make an account: trimaran register USER)",
    )


def in_quarantine(group: str, peer_id: str) -> TrimaranError:
    return TrimaranError(
        f"This peer is in quarantine in {group}: several members reported that it sent wrong pieces. It gets and "
        "gives nothing there.",
        exit_code=Exit.DENIED,
        code="quarantined",
        hint="What was fetched is kept. Check this machine's disk and memory, then ask an admin of the group: "
        f"trimaran group quarantine {group} --lift {peer_id}",
    )


def of_system(error: OSError) -> TrimaranError | None:
    """An error of the operating system that a person can act on; None for one that nobody expected."""
    where = f" ({error.filename})" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return TrimaranError(
                f"There is no space left on the disk{where}.",
                exit_code=Exit.NO_SPACE,
                code="no-space",
                hint="Make room, then run the same command again: what is complete is kept.",
            )
        case errno.ENOENT | errno.ENOTDIR:
            return TrimaranError(
                f"There is no such file or folder{where}.",
                exit_code=Exit.NOT_FOUND,
                code="no-such-path",
                hint="Check the path.",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return TrimaranError(
                f"The system does not allow that{where}: {error.strerror}.",
                exit_code=Exit.DENIED,
                code="no-permission",
                hint="Check who owns the file or folder.",
            )
        case errno.EADDRINUSE | errno.EADDRNOTAVAIL:
            return TrimaranError(
                f"The address cannot be listened on: {error.strerror}.",
                exit_code=Exit.CONFLICT,
                code="address-in-use",
                hint="Choose another port, or stop what uses this one.",
            )
        case errno.EMFILE | errno.ENFILE:
            return TrimaranError(
                "Too many files are open.",
                exit_code=Exit.UNEXPECTED,
                code="too-many-open-files",
                hint="Raise the limit (ulimit -n 4096) and run the same command again.",
            )
        case _:
            return None
