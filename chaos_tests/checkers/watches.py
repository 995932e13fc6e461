"""The watch's contract: ordered, unique, without gaps, on whatever node a stream goes on."""

from __future__ import annotations

from collections import defaultdict

from chaos_tests.checkers.revisions import Log
from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import Watched


def check(messages: list[Watched], log: Log) -> list[Verdict]:
    """Each watcher's messages rise strictly in revision, and between its first and its last it missed
    nothing that the log has under its prefix (but for gaps it was told of: `resumed` after a 410)."""
    by_watcher: dict[str, list[Watched]] = defaultdict(list)
    for message in messages:
        by_watcher[message.watcher].append(message)
    verdicts = []
    for watcher, stream in sorted(by_watcher.items()):
        verdicts.append(_check_stream(watcher, stream, log))
    return verdicts


def _check_stream(watcher: str, stream: list[Watched], log: Log) -> Verdict:
    name = f"watch {watcher}"
    last = 0
    got: set[int] = set()
    gaps: list[tuple[int, int]] = []
    for message in stream:
        if message.revision <= last:
            what = "again" if message.revision in got else "out of order"
            return violated(
                name, len(stream), f"revision {message.revision} came {what}, after {last}", message.at_ns
            )
        if message.resumed:
            gaps.append((last, message.revision))
        got.add(message.revision)
        last = message.revision
    if not stream:
        return held(name, 0)
    prefix, first = stream[0].prefix, stream[0].revision
    for revision in sorted(log):
        if not first <= revision <= last or revision in got:
            continue
        if any(low < revision < high for low, high in gaps):
            continue
        missed = [event["path"] for event in log[revision] if _under(event["path"], prefix)]
        if missed:
            return violated(
                name, len(stream), f"revision {revision} never came: {missed[:3]}", stream[-1].at_ns
            )
    return held(name, len(stream))


def _under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix.rstrip("/") + "/")
