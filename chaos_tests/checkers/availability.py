"""What goes on while trackers are gone: with a minority gone, writes; with a majority gone, honest answers to
writes, and downloads."""

from __future__ import annotations

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import History, Operation

AGAIN_WITHIN_SECONDS = 5.0  # a leader is found by then, so writes are acknowledged from then on
PROGRESS_LAG_SECONDS = 4.0  # how long the rig's reading of a download may be behind


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


def check_majority_gone(history: History, kind: str) -> Verdict:
    """No write is acknowledged; a node that lives says so itself, before the client gives up; downloads go on."""
    name = "honest without a majority"
    checked = 0
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
        if _moved_bytes(history, begin, end) == 0:
            return violated(name, checked, f"no download went on with {fault.target} gone", begin)
    return held(name, checked)


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
