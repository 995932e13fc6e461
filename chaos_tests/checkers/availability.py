"""What goes on while trackers are gone: with a minority gone, writes; with a majority gone, honest answers to
writes, and downloads."""

from __future__ import annotations

from collections.abc import Collection

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import History, Operation

AGAIN_WITHIN_SECONDS = 5.0  # a leader is found by then, so writes are acknowledged from then on
PROGRESS_LAG_SECONDS = 4.0  # how long the rig's reading of a download may be behind
RECOVERED_SECONDS = 5.0  # a download goes on again by then after something was done to a peer


def check_minority_gone(history: History, kind: str) -> Verdict:
    """Five survive any two, three any one: writes called `AGAIN_WITHIN_SECONDS` later are acknowledged."""
    name = "writes go on with a minority gone"
    checked = 0
    for fault in history.faults:
        if fault.kind != kind or not fault.bit:
            continue
        begin, end = fault.gone_ns[0] + int(AGAIN_WITHIN_SECONDS * 1e9), fault.gone_ns[1]
        done = [o for o in _writes(history.operations) if o.call_ns >= begin and o.end_ns <= end]
        checked += len(done)
        if done and not any(o.end == "ok" for o in done):
            return violated(
                name, checked, f"none of {len(done)} writes was acknowledged with {fault.target} gone", begin
            )
    return held(name, checked)


def check_majority_gone(
    history: History, kind: str, peers_faults: Collection[str] = (), must_see_downloads: bool = False
) -> Verdict:
    """No write is acknowledged; a node that lives says so itself, before the client gives up; downloads go on. Whether
    they do is judged when nothing was done to a peer at the same time (`peers_faults`), and if that was never, the
    check cannot tell."""
    name = "honest without a majority"
    checked = judged = 0
    for fault in history.faults:
        if fault.kind != kind or not fault.bit:
            continue
        begin, end = fault.gone_ns
        inside = [o for o in _writes(history.operations) if o.call_ns >= begin and o.end_ns <= end]
        checked += len(inside)
        for operation in inside:
            if operation.end == "ok":
                return violated(
                    name, checked, f"operation {operation.id} was acknowledged with {fault.target} gone",
                    operation.call_ns, [operation.id],
                )  # fmt: skip
        living = [o for o in inside if o.node not in fault.target.split()]
        if living and not any(o.detail.startswith("5") for o in living):
            return violated(
                name,
                checked,
                f"no living node answered any of {len(living)} writes with {fault.target} gone",
                begin,
            )
        moved = None if _peers_hurt(history, peers_faults, begin, end) else _moved_bytes(history, begin, end)
        if moved == 0:
            return violated(name, checked, f"no download went on with {fault.target} gone", begin)
        judged += moved is not None
    if must_see_downloads and not judged:
        message = "no download was under way with all peers well while a majority was gone"
        return Verdict(name=name, result="unknown", checked=checked, message=message)
    return held(name, checked, f"downloads went on {judged} times of {judged}")


def _peers_hurt(history: History, kinds: Collection[str], begin_ns: int, end_ns: int) -> bool:
    recovered_ns = int(RECOVERED_SECONDS * 1e9)
    return any(
        fault.kind in kinds and fault.begin_ns < end_ns and fault.end_ns + recovered_ns > begin_ns
        for fault in history.faults
    )


def _writes(operations: list[Operation]) -> list[Operation]:
    return [operation for operation in operations if operation.request_id]


def _moved_bytes(history: History, begin_ns: int, end_ns: int) -> int | None:
    """Bytes that all downloads gained in a span; None when none was under way all the time."""
    gained: list[int] = []
    late = end_ns + int(PROGRESS_LAG_SECONDS * 1e9)
    for transfer in history.transfers:
        if transfer.begin_ns > begin_ns or transfer.end_ns < end_ns:
            continue
        before = [done for at, done in transfer.progress if at <= begin_ns]
        after = [done for at, done in transfer.progress if begin_ns < at <= late]
        if before and after and before[-1] < transfer.size_bytes:
            gained.append(after[-1] - before[-1])
    return sum(gained) if gained else None
