"""What users hold on to: removed people stay out, leases are true, downloads end right, nothing hangs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import Fault, History, Life, Load, Operation, Presence, Transfer
from chaos_tests.load import NAP_SECONDS

DEADLINE_SLACK_SECONDS = 1.0
READING_GAP_SECONDS = 3.0


def check_removals(operations: list[Operation]) -> Verdict:
    """After an acknowledged removal, every access of that person that begins later is denied, on every
    node, until an acceptance that may have taken effect. Accesses are `access` operations on the key of
    the membership; `ok` means it was let in."""
    name = "removed people stay out"
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    checked = 0
    for key, group in by_key.items():
        removals = [o for o in group if o.name in ("kick", "leave") and o.end == "ok"]
        grants = [o for o in group if o.name == "accept" and o.end in ("ok", "unknown")]
        for access in (o for o in group if o.name == "access" and o.end != "fail"):
            before = [r for r in removals if r.end_ns < access.call_ns]
            if not before:
                continue
            removal = max(before, key=lambda r: r.end_ns)
            # A grant that could have come after the removal and before the access ended explains it.
            explained = any(
                (g.end_ns > removal.call_ns or g.open) and g.call_ns < access.end_ns for g in grants
            )
            if explained:
                continue
            checked += 1
            if access.end == "ok":
                late = (access.call_ns - removal.end_ns) / 1e9
                return violated(
                    name, checked,
                    f"{key}: let in on {access.node} {late:.3f} s after the removal had been acknowledged",
                    access.call_ns, [removal.id, access.id],
                )  # fmt: skip
    return held(name, checked)


def check_leases(
    presences: list[Presence], lives: list[Life], gone_within_seconds: float, settle_seconds: float
) -> Verdict:
    """A silent peer is gone `gone_within_seconds` after its silence began; one that has been announcing
    for `settle_seconds` is never missing. Presences are linearizable readings, so a cluster without a
    leader gives none, and a gap in them is a time in which nobody could announce: who came in it has
    `settle_seconds` from its end."""
    name = "leases are true"
    by_peer: dict[str, list[Life]] = defaultdict(list)
    for life in lives:
        by_peer[life.peer_id].append(life)
    checked = 0
    listed: set[tuple[str, int]] = set()
    available_ns: int | None = None  # since when readings have come without a gap
    last_ns = 0
    for presence in sorted(presences, key=lambda presence: presence.at_ns):
        spans = by_peer.get(presence.peer_id, [])
        alive = any(
            life.from_ns + settle_seconds * 1e9 <= presence.call_ns and presence.at_ns <= life.to_ns
            for life in spans
        )
        begun = [life for life in spans if life.from_ns <= presence.at_ns]
        long_gone = bool(begun) and all(
            life.to_ns + gone_within_seconds * 1e9 < presence.call_ns for life in begun
        )
        if presence.seen and alive:
            listed.add((presence.peer_id, max(life.from_ns for life in begun)))
        if available_ns is None or presence.call_ns > last_ns + READING_GAP_SECONDS * 1e9:
            available_ns = presence.call_ns
        last_ns = max(last_ns, presence.at_ns)
        if alive:
            checked += 1
            # A peer that came while nobody could be told has as long from when somebody could.
            was_listed = (presence.peer_id, max(life.from_ns for life in begun)) in listed
            settled = available_ns + settle_seconds * 1e9 <= presence.call_ns
            if not presence.seen and (was_listed or settled):
                return violated(
                    name, checked, f"living peer {presence.peer_id[:8]} was dropped", presence.at_ns
                )
        elif long_gone:
            checked += 1
            if presence.seen:
                return violated(
                    name, checked, f"silent peer {presence.peer_id[:8]} is still listed", presence.at_ns
                )
    return held(name, checked)


def check_transfers(transfers: list[Transfer]) -> Verdict:
    """Every download that can finish did, with the right bytes; none ever shows wrong ones."""
    name = "downloads end with the right bytes"
    for transfer in transfers:
        label = f"{transfer.peer}: {transfer.group}/{transfer.name}"
        if transfer.got_sha256 and transfer.got_sha256 != transfer.wanted_sha256:
            return violated(name, len(transfers), f"{label} has the wrong bytes", transfer.end_ns)
        if transfer.can_finish and not transfer.got_sha256:
            return violated(
                name, len(transfers), f"{label} never finished (exit {transfer.exit_code})", transfer.begin_ns
            )
    return held(name, len(transfers), f"{sum(t.size_bytes for t in transfers)} bytes")


def check_deadlines(operations: list[Operation], loads: Sequence[Load] = ()) -> Verdict:
    """Nothing waits past its deadline. When the rig itself overslept as much in that time, who was late cannot
    be told: `unknown`."""
    name = "nothing waits past its deadline"
    unclear = ""
    for operation in operations:
        late_ns = operation.end_ns - operation.deadline_ns
        if late_ns <= DEADLINE_SLACK_SECONDS * 1e9:
            continue
        told = (
            f"operation {operation.id} ({operation.name} {operation.key} on {operation.node}) ended "
            f"{late_ns / 1e9:.1f} s after its deadline"
        )
        slept = sum(
            load.late_seconds
            for load in loads
            if load.at_ns <= operation.end_ns
            and load.at_ns + (NAP_SECONDS + load.late_seconds) * 1e9 >= operation.call_ns
        )
        if slept * 1e9 < late_ns - DEADLINE_SLACK_SECONDS * 1e9:
            return violated(name, len(operations), told, operation.call_ns, [operation.id])
        unclear = (
            unclear or f"{told}, when the rig itself overslept by {slept:.1f} s: this machine is too busy"
        )
    if unclear:
        return Verdict(name=name, result="unknown", checked=len(operations), message=unclear)
    return held(name, len(operations))


def check_logs(folder: Path) -> Verdict:
    """No process ever printed a traceback."""
    name = "no tracebacks"
    logs = sorted(folder.rglob("*.log"))
    for log in logs:
        if log.name.startswith("journal-"):
            continue
        text = log.read_text(errors="replace")
        if (place := text.find("Traceback (most recent call last)")) >= 0:
            return violated(name, len(logs), f"{log.name}: {text[place : place + 3000].strip()}")
    return held(name, len(logs))


def check_nodes(faults: list[Fault]) -> Verdict:
    """No node takes part with a damaged disk, and none ends by itself."""
    name = "nodes refuse damage, and live otherwise"
    wrong = next((fault for fault in faults if fault.wrong), None)
    if wrong is not None:
        return violated(name, len(faults), wrong.wrong, wrong.begin_ns)
    return held(name, len(faults))


def check_honesty(history: History, operations_per_second_min: float, kinds: set[str]) -> Verdict:
    """The run was worth something: enough acknowledged work, and each of these kinds of fault bit."""
    name = "the run bit"
    begun_ns = min(
        (operation.call_ns for operation in history.operations), default=0
    )  # setting up does not count
    seconds = max((history.healed_ns or history.end_ns) - begun_ns, 1) / 1e9
    acknowledged = sum(o.end in ("ok", "refused") for o in history.operations)
    rate = acknowledged / seconds
    if rate < operations_per_second_min:
        return violated(
            name, acknowledged, f"{rate:.1f} acknowledged operations/s, below {operations_per_second_min}"
        )
    bit = {fault.kind for fault in history.faults if fault.bit}
    if missing := sorted(kinds - bit):
        return violated(
            name, len(history.faults), f"these faults had no visible effect: {', '.join(missing)}"
        )
    return held(
        name,
        len(history.faults),
        f"{rate:.0f} acknowledged operations/s, faults: {', '.join(sorted(bit)) or 'none'}",
    )
