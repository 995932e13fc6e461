"""The checks of what goes on while trackers are gone say no to histories that are wrong in each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chaos_tests import history as h
from chaos_tests.checkers import availability, product

S = 1_000_000_000
KIND = "gone"


def write(call: float, ended: float, **more: Any) -> h.Operation:
    fields: dict[str, Any] = {
        "id": int(call * 10), "client": "c", "name": "publish", "key": "file:g:f", "node": "n1", "input": "",
        "call_ns": int(call * S), "deadline_ns": int((call + 5) * S), "end_ns": int(ended * S), "request_id": "x",
        "end": "fail", "detail": "503",
    } | more  # fmt: skip
    return h.Operation(**fields)


def transfer(*progress: tuple[int, int]) -> h.Transfer:
    return h.Transfer(
        peer="p",
        group="g",
        name="f",
        begin_ns=0,
        size_bytes=100,
        progress=[(at * S, done) for at, done in progress],
    )


def run(operations: list[h.Operation], *transfers: h.Transfer, target: str = "n2") -> h.History:
    fault = h.Fault(
        kind=KIND, target=target, begin_ns=9 * S, end_ns=21 * S, bit=True, gone_ns=(10 * S, 20 * S)
    )
    return h.History(operations=operations, faults=[fault], transfers=list(transfers))


def test_writes_must_go_on_with_a_minority_gone() -> None:
    def result(*operations: h.Operation) -> str:
        return availability.check_minority_gone(run(list(operations)), KIND).result

    assert result(write(16, 17, end="ok"), write(17, 18)) == "held"
    assert result(write(16, 17), write(17, 18)) == "violated"
    assert result(write(11, 12)) == "held", "before the new leader must be there"


def test_no_write_is_acknowledged_without_a_majority() -> None:
    target = "n2 n3"
    assert availability.check_majority_gone(run([write(11, 12)], target=target), KIND).result == "held"
    assert (
        availability.check_majority_gone(run([write(11, 12, end="ok")], target=target), KIND).result
        == "violated"
    )


def test_a_living_node_says_so_itself() -> None:
    silent = write(11, 17, detail="0", end="unknown")
    assert availability.check_majority_gone(run([silent], target="n2 n3"), KIND).result == "violated"
    assert availability.check_majority_gone(run([silent], target="n1 n3"), KIND).result == "held", (
        "it was gone"
    )


def test_downloads_go_on_without_a_majority() -> None:
    answered = [write(11, 12)]
    going, stuck = transfer((9, 10), (19, 60)), transfer((9, 10), (19, 10))
    assert availability.check_majority_gone(run(answered, going, stuck), KIND).result == "held"
    assert availability.check_majority_gone(run(answered, stuck), KIND).result == "violated"
    assert availability.check_majority_gone(run(answered), KIND).result == "held", "there was none"


def test_downloads_are_judged_only_while_no_peer_is_hurt_and_must_be_judged_once() -> None:
    answered = [write(11, 12)]
    stuck = transfer((9, 10), (19, 10))

    def result(*more: h.Fault, must: bool = False) -> str:
        history = run(answered, stuck)
        history.faults += more
        return availability.check_majority_gone(history, KIND, {"peer killed"}, must).result

    hurt = h.Fault(kind="peer killed", target="p", begin_ns=12 * S, end_ns=13 * S)
    before = h.Fault(kind="peer killed", target="p", begin_ns=1 * S, end_ns=4 * S)
    assert result() == "violated"
    assert result(hurt) == "held"
    assert result(hurt, must=True) == "unknown"
    assert result(before) == "violated"


def test_a_traceback_in_any_log_is_seen(tmp_path: Path) -> None:
    (tmp_path / "n1.log").write_text("ready\n")
    assert product.check_logs(tmp_path).result == "held"
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "p.log").write_text(
        "x\nTraceback (most recent call last)\n  File\nValueError: no\n"
    )
    verdict = product.check_logs(tmp_path)
    assert verdict.result == "violated" and "ValueError" in verdict.message


def test_lateness_of_the_machine_itself_is_no_verdict() -> None:
    late = [write(10, 18)]  # its deadline was at 15
    assert product.check_deadlines([write(10, 14)]).result == "held"
    assert product.check_deadlines(late).result == "violated"
    asleep = h.Load(at_ns=12 * S, runnable=30.0, late_seconds=2.5)
    assert product.check_deadlines(late, [asleep]).result == "unknown"
    napping = h.Load(at_ns=12 * S, runnable=30.0, late_seconds=0.5)
    assert product.check_deadlines(late, [napping]).result == "violated"
