"""The catalogue of problems: every kind of refusal the API gives, once.

Owned here: code, status, title, default outcome, and the page's text. The server builds its problem
documents from it, the client maps codes to exit codes with it, `docs/reference/problems/` is generated
from it. Left to others: the words for one occurrence (`detail`, `hint`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["definite", "indefinite"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem. `retry` says whether the same request, unchanged, may succeed later or at
    another node."""

    code: str
    status: int
    title: str
    about: str
    advice: str
    outcome: Outcome = "definite"
    retry: bool = False

    @property
    def type(self) -> str:
        return f"/problems/{self.code}"


UNAUTHENTICATED = Kind(
    "unauthenticated",
    401,
    "Not signed in",
    "The request carries no session, or one that is malformed, expired, or was ended by signing out or by "
    "a change of password.",
    "Sign in again: `trimaran login USER`.",
)
BAD_CREDENTIALS = Kind(
    "bad-credentials",
    401,
    "Wrong user or password",
    "No user has this name and this password. Which of the two is wrong is not told.",
    "Check both. Without an account yet, make one: `trimaran register USER`.",
)
DENIED = Kind(
    "denied",
    403,
    "Not allowed",
    "The caller is not a member of the group, or has not the role this needs. Asked about a group that "
    "does not exist, a stranger gets the same answer.",
    "Ask to join (`trimaran group join GROUP`), or ask an admin of the group.",
)
OPERATORS_ONLY = Kind(
    "operators-only",
    403,
    "For operators only",
    "This is done with an operator's client certificate, made by `trimaran tracker init`. No account can "
    "become an operator.",
    "Run it on the tracker's machine, or with the operator's certificate.",
)
NOT_FOUND = Kind(
    "not-found",
    404,
    "Not found",
    "What was named does not exist (any more).",
    "See what there is: `trimaran group list`, `trimaran files GROUP`, `trimaran group members GROUP`.",
)
NO_SUCH_ROUTE = Kind(
    "no-such-route",
    404,
    "No such resource",
    "The API has no resource at this path.",
    "See `/openapi.json` for all paths.",
)
METHOD_NOT_ALLOWED = Kind(
    "method-not-allowed",
    405,
    "Method not allowed",
    "The resource exists, but not with this method; `Allow` names those it has.",
    "See `/openapi.json`.",
)
CONFLICT = Kind(
    "conflict",
    409,
    "Conflict",
    "It contradicts what is: the name is taken, the content differs, the user is already a member, ...",
    "See what is there now (`trimaran files GROUP`, `trimaran group members GROUP`), then decide.",
)
INVALID = Kind(
    "invalid",
    400,
    "Invalid request",
    "A field of the body, a parameter or a header breaks a rule; `field` names it.",
    "Correct the field and send it again with a new Idempotency-Key.",
)
UNSUPPORTED_MEDIA_TYPE = Kind(
    "unsupported-media-type",
    415,
    "Not JSON",
    "Bodies are JSON, sent with `Content-Type: application/json` and without compression.",
    "Set the header.",
)
TOO_LARGE = Kind(
    "too-large",
    413,
    "Too large",
    "The body is larger than this route takes.",
    "Send less at once; announcements may be split.",
)
TOO_SLOW = Kind(
    "too-slow",
    408,
    "Too slow",
    "The body did not arrive in time; nothing was done with what had arrived.",
    "Send it again.",
    retry=True,
)
OVER_LIMIT = Kind(
    "over-limit",
    422,
    "Over a limit",
    "It would pass one of the documented limits; `field` names what.",
    "Remove something first, or ask an operator.",
)
REQUEST_MISMATCH = Kind(
    "request-mismatch",
    422,
    "Idempotency-Key used twice",
    "This Idempotency-Key already belongs to another request of the same caller. Nothing was done.",
    "Use a new UUIDv7 for every new request, and the same one only to repeat it.",
)
REQUEST_TOO_OLD = Kind(
    "request-too-old",
    409,
    "Too old to tell",
    "The outcome of a request with this Idempotency-Key is no longer kept, if there was one. It was not "
    "executed now; it may have been earlier.",
    "Look at the present state; send it as a new request if it is still wanted.",
    outcome="indefinite",
)
HISTORY_GONE = Kind(
    "history-gone",
    410,
    "History no longer kept",
    "The watch cannot start at this revision: it lies before the kept history, or in a future that a "
    "restored cluster never had.",
    "List again, then watch from the revision of that answer.",
)
RATE_LIMITED = Kind(
    "rate-limited",
    429,
    "Too many attempts",
    "Too many failed sign-ins for this account or from this address.",
    "Wait for `retry_after_seconds`.",
    retry=True,
)
UNAVAILABLE = Kind(
    "unavailable",
    503,
    "Cluster unavailable",
    "The node cannot reach agreement now: no leader, no quorum, or it is stopping. Nothing was done.",
    "Try another node, or again in a moment.",
    retry=True,
)
OVERLOADED = Kind(
    "overloaded",
    503,
    "Overloaded",
    "More is waiting here than the node can take. Nothing was done.",
    "Try again after `retry_after_seconds`, or another node.",
    retry=True,
)
DISK_FULL = Kind(
    "disk-full",
    503,
    "Disk full",
    "The disk of the leader, or of a majority of the nodes, is full, so writes are refused. What was acknowledged is kept; nothing was done.",
    "Make room on the tracker's disk; writes go on by themselves.",
    retry=True,
)
BEHIND = Kind(
    "behind",
    503,
    "Node is behind",
    "This node has not yet seen the revision that was asked for.",
    "Try another node, or again in a moment.",
    retry=True,
)
OUTCOME_UNKNOWN = Kind(
    "outcome-unknown",
    504,
    "Outcome unknown",
    "The cluster did not confirm in time. The change may or may not take effect.",
    "Send the same request with the same Idempotency-Key, to any node: it takes effect at most once, and "
    "gives the first answer.",
    outcome="indefinite",
    retry=True,
)
UNSUPPORTED = Kind(
    "unsupported",
    501,
    "Not supported",
    "This cluster does not do that: it runs an older version, or was set up without what it needs.",
    "Upgrade the nodes, or see the detail.",
)
INTERNAL = Kind(
    "internal",
    500,
    "Unexpected error",
    "A defect in the tracker. The log of the node has the details; the change may or may not have taken "
    "effect.",
    "Look at the present state; report the defect with the node's log.",
    outcome="indefinite",
)

KINDS: dict[str, Kind] = {kind.code: kind for kind in list(globals().values()) if isinstance(kind, Kind)}
