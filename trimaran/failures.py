"""Which failure becomes which words and which exit code. The table is `docs/reference/exit-codes.md`.

Owned here: turning what nodes raise into `TrimaranError`, and the last resort: a crash log in the home instead of a
traceback. Left to others: the trackers' refusals and the system's (`peer/trouble.py`), printing (`output.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from peer.reports import Exit, TrimaranError
from peer.trouble import sentence


def of_node(error: Exception) -> TrimaranError | None:
    """What starting, joining or running a node raises; None for anything else."""
    if not type(error).__module__.startswith("cluster."):
        return None
    from cluster.api.certificates import CertificateProblem
    from cluster.app import NodeConflictError, NodeError
    from cluster.authority import AuthorityError
    from cluster.config import ConfigError

    if isinstance(error, CertificateProblem):
        return TrimaranError(
            sentence(str(error)),
            exit_code=Exit.USAGE,
            code="bad-certificate",
            hint="Name the cluster's CA with --ca FILE (or TRIMARAN_CA): it is the ca.pem in a tracker's data folder.",
        )
    if isinstance(error, ConfigError):
        nameless = (
            "Name the folder of a node that was made before with --data-dir, or a new node with --node-id."
        )
        hint = nameless if error.field == "node_id" else ""
        return TrimaranError(sentence(str(error)), exit_code=Exit.USAGE, code="usage", hint=hint)
    if isinstance(error, AuthorityError):
        exit_code = Exit.DENIED if error.denied else Exit.USAGE
        return TrimaranError(
            sentence(str(error)),
            exit_code=exit_code,
            code="denied" if error.denied else "usage",
            hint=error.hint,
        )
    if isinstance(error, NodeConflictError):
        return TrimaranError(
            sentence(str(error)),
            exit_code=Exit.CONFLICT,
            code="conflict",
            hint="Stop what is in the way, or name another folder or address. Nothing was changed.",
        )
    if isinstance(error, NodeError):
        return TrimaranError(
            sentence(str(error)),
            exit_code=Exit.UNEXPECTED,
            code="node-stopped",
            hint="What was acknowledged is kept in the data folder.",
        )
    return None


def crashed(home: Path, error: BaseException) -> TrimaranError:
    """Nobody expected this: keep the traceback where it helps, and say so in two lines."""
    import traceback

    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    path: Path | None = None
    for folder in (home, Path("/tmp")):  # noqa: S108 - only where the home cannot be written
        candidate = folder / f"crash-{stamp}.log"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            candidate.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except OSError:
            continue
        path = candidate
        break
    return TrimaranError(
        f"Something unexpected happened ({type(error).__name__}).",
        exit_code=Exit.UNEXPECTED,
        code="unexpected",
        outcome="indefinite",
        hint=f"The details are in {path}; please report them." if path else "No crash log could be written.",
    )
