"""What nodes say of themselves: one leader a term, equal digests at equal revisions, and agreement and a
leader in time once the faults have ended."""

from __future__ import annotations

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import History, Sample

LEADER_WITHIN_SECONDS = 5.0
EQUAL_WITHIN_SECONDS = 15.0


LED = ("leader", "led")  # by its own word, and by an entry that it sent as the leader of that term


def check_leaders(samples: list[Sample]) -> Verdict:
    name = "one leader per term"
    leaders: dict[int, Sample] = {}
    checked = 0
    for sample in samples:
        if sample.role not in LED:
            continue
        checked += 1
        known = leaders.setdefault(sample.term, sample)
        if known.node != sample.node:
            return violated(
                name,
                checked,
                f"term {sample.term} was led by {known.node} and by {sample.node}",
                sample.at_ns,
            )
    return held(name, checked, f"{len(leaders)} terms")


def check_digests(samples: list[Sample]) -> Verdict:
    name = "equal digests at equal revisions"
    digests: dict[tuple[int, str], Sample] = {}
    compared = 0
    for sample in samples:
        if not sample.digest:
            continue
        known = digests.setdefault((sample.revision, sample.remembered), sample)
        compared += known is not sample
        if known.digest != sample.digest:
            return violated(
                name, compared,
                f"at revision {sample.revision} {known.node} has {known.digest[:16]}, {sample.node} has {sample.digest[:16]}",
                sample.at_ns,
            )  # fmt: skip
    return held(name, compared)


def check_liveness(history: History, nodes: set[str]) -> Verdict:
    """After `healed_ns`: a leader within 5 s, all nodes at one digest and revision within 15 s."""
    name = "liveness after the faults"
    if not history.healed_ns:
        return Verdict(
            name=name, result="unknown", checked=0, message="the run never reached the healed phase"
        )
    after = sorted((s for s in history.samples if s.at_ns >= history.healed_ns), key=lambda s: s.at_ns)
    leader_at = next((s.at_ns for s in after if s.role == "leader"), None)
    if leader_at is None or leader_at > history.healed_ns + LEADER_WITHIN_SECONDS * 1e9:
        return violated(
            name, len(after), f"no leader within {LEADER_WITHIN_SECONDS:.0f} s", history.healed_ns
        )
    latest: dict[str, tuple[int, str]] = {}
    for sample in after:
        if sample.digest:
            latest[sample.node] = (sample.revision, sample.digest)
        if set(latest) >= nodes and len(set(latest.values())) == 1:
            if sample.at_ns > history.healed_ns + EQUAL_WITHIN_SECONDS * 1e9:
                break
            return held(name, len(after), f"leader after {(leader_at - history.healed_ns) / 1e9:.2f} s, equal after "
                        f"{(sample.at_ns - history.healed_ns) / 1e9:.2f} s")  # fmt: skip
    return violated(
        name, len(after), f"not equal within {EQUAL_WITHIN_SECONDS:.0f} s: {latest}", history.healed_ns
    )
