"""The linear-time check: by revision, against the log.

The log is what the watch told: all events of each revision, as collected from every node. Every answer
carries the revision it is as of, so a long history is checked in one pass:

* an acknowledged write stands in the log at its revision, and no other write has that revision;
* a write that ended before another began has the lower revision; a read is as of no older a revision
  than anything that ended before it began;
* a read at revision r shows what folding the log up to r gives;
* a request id stands for one revision, however often it was sent;
* a write stands in the log at most once, whatever its client was told.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import History, Operation, Watched

Log = dict[int, list[dict[str, Any]]]
READS = frozenset({"read"})


def log_of(history: History) -> tuple[Log, list[Verdict]]:
    """Merge all watch streams into one log; two streams that differ on a revision are a violation.

    Streams are filtered by rights and prefix, so only events of the same path are compared.
    """
    by_path: dict[tuple[int, str], tuple[str, Any]] = {}
    log: Log = defaultdict(list)
    for message in sorted(history.watched, key=lambda m: m.at_ns):
        for event in message.events:
            place = (message.revision, event["path"])
            content = (event["type"], event["value"])
            if place not in by_path:
                by_path[place] = content
                log[message.revision].append(event)
            elif by_path[place] != content:
                return dict(log), [
                    violated(
                        "log agreement", len(by_path),
                        f"revision {message.revision} {event['path']}: {by_path[place]} and {content} (from {message.node})",
                        message.at_ns,
                    )
                ]  # fmt: skip
    return dict(log), [held("log agreement", len(by_path))]


def check_order(operations: list[Operation]) -> Verdict:
    """Real-time order of revisions."""
    name = "real-time order"
    done = [o for o in operations if o.end == "ok" and o.revision is not None]
    revision_of = {o.id: o.revision or 0 for o in done}
    ended: list[tuple[int, int]] = []  # (end_ns, id), a heap
    highest, by = -1, -1
    for operation in sorted(done, key=lambda o: o.call_ns):
        while ended and ended[0][0] < operation.call_ns:
            _, other = heapq.heappop(ended)
            if revision_of[other] > highest:
                highest, by = revision_of[other], other
        heapq.heappush(ended, (operation.end_ns, operation.id))
        if revision_of[operation.id] < highest:
            return violated(
                name, len(done),
                f"operation {operation.id} ({operation.name} {operation.key} on {operation.node}) answered as of revision "
                f"{operation.revision}, after operation {by} had ended at revision {highest}",
                operation.call_ns, [by, operation.id],
            )  # fmt: skip
    return held(name, len(done))


def check_request_ids(operations: list[Operation]) -> Verdict:
    """One request id, one revision; one revision, one request id."""
    name = "request ids applied once"
    first: dict[str, Operation] = {}
    holder: dict[int, Operation] = {}
    checked = 0
    for operation in operations:
        if operation.end != "ok" or not operation.request_id or operation.revision is None:
            continue
        checked += 1
        known = first.setdefault(operation.request_id, operation)
        if known.revision != operation.revision:
            return violated(
                name, checked,
                f"request {operation.request_id} was answered at revisions {known.revision} and {operation.revision}",
                operation.call_ns, [known.id, operation.id],
            )  # fmt: skip
    for operation in first.values():
        if operation.output == "unchanged":
            continue  # it changed nothing, so its revision is another's
        other = holder.setdefault(operation.revision or 0, operation)
        if other is not operation:
            return violated(
                name, checked,
                f"revision {operation.revision} was given to requests {other.request_id} and {operation.request_id}",
                operation.call_ns, [other.id, operation.id],
            )  # fmt: skip
    return held(name, checked)


# What an acknowledged write must have left in the log at its revision, given the operation: (path, type).
Trace = Callable[[Operation], tuple[str, str] | None]


def check_applied_once(operations: list[Operation], log: Log) -> Verdict:
    """What is published under a name no other write gives (a manifest id) appears at one revision at most, also
    when the client was not told."""
    name = "writes applied at most once"
    at: dict[str, list[int]] = defaultdict(list)
    for revision in sorted(log):
        for event in log[revision]:
            if event["type"] in ("file.published", "file.replaced"):
                at[event["value"]["manifest_id"]].append(revision)
    sent = [o for o in operations if o.name in ("publish", "replace")]
    for operation in sent:
        if len(revisions := at.get(operation.input, [])) > 1:
            return violated(
                name, len(sent),
                f"operation {operation.id} ({operation.name} {operation.key}, {operation.end}) took effect at revisions "
                f"{revisions}",
                operation.call_ns, [operation.id],
            )  # fmt: skip
    return held(name, len(sent))


class Unseen:
    """The revisions that nobody told the rig of: every watcher of a prefix had to list anew there (410)."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        last: dict[str, int] = {}
        gaps: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for message in sorted(watched, key=lambda message: message.at_ns):
            own = gaps[message.prefix][message.watcher]
            if message.resumed:
                own.append((last.get(message.watcher, 0), message.revision))
            last[message.watcher] = message.revision
        self._spans = {prefix: _common(list(watchers.values())) for prefix, watchers in gaps.items()}

    def between(self, path: str, low: int, high: int) -> bool:
        """Whether any revision after `low` and up to `high` was not told of, for what this path is about."""
        return any(
            max(a, low) < min(b - 1, high)
            for prefix, spans in self._spans.items()
            if path.startswith(f"{prefix}/")
            for a, b in spans
        )

    def __contains__(self, place: tuple[str, int]) -> bool:
        """(path, revision)."""
        path, revision = place
        return self.between(path, revision - 1, revision)


def _common(watchers: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """What lies in a gap of each: pairs of revisions, neither of which is missing."""
    common, *others = watchers
    for gaps in others:
        pairs = [(max(a, c), min(b, d)) for a, b in common for c, d in gaps]
        common = [(a, b) for a, b in pairs if a + 1 < b]
    return common


def check_acknowledged(
    operations: list[Operation], log: Log, trace: Trace, watched: Sequence[Watched] = ()
) -> Verdict:
    """No acknowledged write is missing from the log, where the log was seen (`watched`)."""
    name = "acknowledged writes kept"
    checked = 0
    unseen = Unseen(watched)
    for operation in operations:
        if operation.end != "ok" or operation.name in READS or operation.output == "unchanged":
            continue
        expected = trace(operation)
        if expected is None or operation.revision is None or (expected[0], operation.revision) in unseen:
            continue
        checked += 1
        found = {(event["path"], event["type"]) for event in log.get(operation.revision, [])}
        if expected not in found:
            return violated(
                name, checked,
                f"operation {operation.id} ({operation.name} {operation.key}) was acknowledged at revision "
                f"{operation.revision}, where the log has {sorted(found) or 'nothing'}",
                operation.call_ns, [operation.id],
            )  # fmt: skip
    return held(name, checked)


# The value a key has after an event about it; None when the event does not concern it.
Fold = Callable[[dict[str, Any]], tuple[str, Any] | None]


def check_reads(
    operations: list[Operation],
    log: Log,
    fold: Fold,
    absent: Mapping[str, Any],
    path_of: Callable[[str], str],
    watched: Sequence[Watched] = (),
) -> Verdict:
    """Every read shows the log folded up to its revision, where the log was seen (`watched`). `absent`: the value
    at the beginning, by the kind of key; `path_of`: what the log calls a key."""
    name = "reads match the log"
    reads = [o for o in operations if o.name in READS and o.end == "ok" and o.revision is not None]
    changes: dict[str, tuple[list[int], list[Any]]] = defaultdict(lambda: ([], []))
    for revision in sorted(log):
        for event in log[revision]:
            folded = fold(event)
            if folded is not None:
                revisions, values = changes[folded[0]]
                revisions.append(revision)
                values.append(folded[1])
    unseen = Unseen(watched)
    checked = 0
    for operation in reads:
        revisions, values = changes[operation.key]
        until = operation.revision or 0
        count = bisect_right(revisions, until)
        if unseen.between(path_of(operation.key), revisions[count - 1] if count else 0, until):
            continue
        checked += 1
        value = values[count - 1] if count else absent[operation.key.partition(":")[0]]
        if value != operation.output:
            return violated(
                name, checked,
                f"operation {operation.id} read {operation.key} as {operation.output!r} as of revision {operation.revision}; "
                f"the log says {value!r}",
                operation.call_ns, [operation.id],
            )  # fmt: skip
    return held(name, checked)
