"""Each checker says no to a history that is wrong in its way, and yes to the right one beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chaos_tests import history as h
from chaos_tests.checkers import cluster, product, revisions, watches
from chaos_tests.checkers.verdict import Verdict

S = 1_000_000_000


def op(
    number: int, name: str, call: float, end_at: float, revision: int | None = None, **more: Any
) -> h.Operation:
    fields: dict[str, Any] = {
        "id": number, "client": "c", "name": name, "key": "file:f", "node": "n1", "input": "", "call_ns": int(call * S),
        "deadline_ns": int((call + 5) * S), "end": "ok", "end_ns": int(end_at * S), "revision": revision,
    } | more  # fmt: skip
    return h.Operation(**fields)


def message(
    watcher: str, revision: int, path: str = "/groups/g/files/f", value: Any = "a", **more: Any
) -> h.Watched:
    events = [{"type": "file.published", "path": path, "value": value}]
    fields: dict[str, Any] = {
        "at_ns": revision * S, "watcher": watcher, "node": "n1", "prefix": "/groups/g", "revision": revision,
        "events": events,
    } | more  # fmt: skip
    return h.Watched(**fields)


def sample(
    node: str, at: float, role: str = "follower", term: int = 1, revision: int = 0, digest: str = ""
) -> h.Sample:
    return h.Sample(at_ns=int(at * S), node=node, role=role, term=term, revision=revision, digest=digest)


def result(verdict: Verdict) -> str:
    assert verdict.result != "violated" or verdict.message
    return verdict.result


def test_a_read_of_the_past_breaks_real_time_order() -> None:
    right = [op(0, "replace", 0, 1, 7), op(1, "read", 2, 3, 7)]
    stale = [op(0, "replace", 0, 1, 7), op(1, "read", 2, 3, 6)]
    concurrent = [op(0, "replace", 0, 3, 7), op(1, "read", 2, 4, 6)]
    assert result(revisions.check_order(right)) == "held"
    assert result(revisions.check_order(stale)) == "violated"
    assert result(revisions.check_order(concurrent)) == "held"


def test_a_request_answered_at_two_revisions_was_applied_twice() -> None:
    once = [op(0, "publish", 0, 1, 5, request_id="x"), op(1, "publish", 2, 3, 5, request_id="x")]
    twice = [op(0, "publish", 0, 1, 5, request_id="x"), op(1, "publish", 2, 3, 6, request_id="x")]
    shared = [op(0, "publish", 0, 1, 5, request_id="x"), op(1, "publish", 0, 1, 5, request_id="y")]
    assert result(revisions.check_request_ids(once)) == "held"
    assert result(revisions.check_request_ids(twice)) == "violated"
    assert result(revisions.check_request_ids(shared)) == "violated"


def trace(operation: h.Operation) -> tuple[str, str] | None:
    return ("/groups/g/files/f", "file.published")


def test_an_acknowledged_write_missing_from_the_log_is_lost() -> None:
    log, agreement = revisions.log_of(h.History(watched=[message("w", 5)]))
    assert [result(v) for v in agreement] == ["held"]
    assert result(revisions.check_acknowledged([op(0, "publish", 0, 1, 5)], log, trace)) == "held"
    assert result(revisions.check_acknowledged([op(0, "publish", 0, 1, 6)], log, trace)) == "violated"


def test_only_what_every_watcher_had_to_list_anew_is_not_missed() -> None:
    lost = [op(0, "publish", 0, 1, 6)]
    one = [message("w", 5), message("v", 5), message("w", 8, resumed=True)]
    whole, both = message("v", 8), message("v", 8, resumed=True)
    log, _ = revisions.log_of(h.History(watched=[*one, whole]))
    assert result(revisions.check_acknowledged(lost, log, trace, [*one, whole])) == "violated"
    assert result(revisions.check_acknowledged(lost, log, trace, [*one, both])) == "held"
    late = [op(0, "publish", 0, 1, 9)]
    assert result(revisions.check_acknowledged(late, log, trace, [*one, both])) == "violated"


def test_streams_that_differ_on_a_revision_are_a_violation() -> None:
    _, agreement = revisions.log_of(
        h.History(watched=[message("w", 5, value="a"), message("v", 5, value="b")])
    )
    assert "violated" in [result(v) for v in agreement]


def test_a_write_that_took_effect_twice_though_nobody_was_told() -> None:
    def log_with(*revisions_of_a: int) -> revisions.Log:
        watched = [message("w", r, value={"manifest_id": "a"}) for r in revisions_of_a]
        return revisions.log_of(h.History(watched=watched))[0]

    lost = [op(0, "publish", 0, 1, input="a", end="unknown", request_id="x")]
    assert result(revisions.check_applied_once(lost, log_with())) == "held"
    assert result(revisions.check_applied_once(lost, log_with(5))) == "held"
    assert result(revisions.check_applied_once(lost, log_with(5, 8))) == "violated"


def test_a_read_must_show_the_log_folded_to_its_revision() -> None:
    log, _ = revisions.log_of(h.History(watched=[message("w", 5, value="a"), message("w", 8, value="b")]))

    def fold(event: dict[str, Any]) -> tuple[str, Any]:
        return "file:f", event["value"]

    right = [
        op(0, "read", 0, 1, 4, output=""),
        op(1, "read", 0, 1, 7, output="a"),
        op(2, "read", 0, 1, 8, output="b"),
    ]

    def check(*operations: h.Operation, watched: tuple[h.Watched, ...] = ()) -> str:
        absent = {"file": ""}
        return result(
            revisions.check_reads(
                list(operations), log, fold, absent, lambda key: "/groups/g/files/f", watched
            )
        )

    assert check(*right) == "held"
    assert check(op(0, "read", 0, 1, 8, output="a")) == "violated"
    assert check(op(0, "read", 0, 1, 4, output="a")) == "violated"
    # Between 5 and 8 nobody was told what happened: a read in there says nothing, those around it do.
    gap = (message("w", 5), message("w", 8, resumed=True))
    assert check(op(0, "read", 0, 1, 7, output="c"), watched=gap) == "held"
    assert check(op(0, "read", 0, 1, 5, output="c"), watched=gap) == "violated"
    assert check(op(0, "read", 0, 1, 8, output="c"), watched=gap) == "violated"
    assert (
        check(op(0, "read", 0, 1, 7, output="c"), watched=(*gap, message("v", 5), message("v", 8)))
        == "violated"
    )


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ([5, 6, 8], "held"),
        ([5, 8], "violated"),  # 6 never came
        ([5, 8, 6], "violated"),  # out of order
        ([5, 6, 6, 8], "violated"),  # again
    ],
)
def test_a_watch_has_order_no_gap_and_no_repeat(stream: list[int], expected: str) -> None:
    log, _ = revisions.log_of(h.History(watched=[message("whole", r) for r in (5, 6, 8)]))
    assert result(watches.check([message("w", r) for r in stream], log)[0]) == expected


def test_a_gap_that_was_told_of_is_allowed_and_one_after_it_is_not() -> None:
    log, _ = revisions.log_of(h.History(watched=[message("whole", r) for r in (5, 6, 8, 9, 10)]))
    told = [message("w", 5), message("w", 8, resumed=True), message("w", 9), message("w", 10)]
    assert result(watches.check(told, log)[0]) == "held"
    assert result(watches.check([told[0], told[1], told[3]], log)[0]) == "violated"


def test_two_leaders_of_one_term() -> None:
    assert result(cluster.check_leaders([sample("a", 0, "leader", 3), sample("b", 1, "leader", 4)])) == "held"
    assert (
        result(cluster.check_leaders([sample("a", 0, "leader", 3), sample("b", 9, "leader", 3)]))
        == "violated"
    )


def test_a_leader_that_never_said_so_but_sent_entries() -> None:
    samples = [sample("a", 0, "leader", 3), sample("b", 9, "led", 3)]
    assert result(cluster.check_leaders(samples)) == "violated"
    assert result(cluster.check_leaders([samples[0], sample("a", 9, "led", 3)])) == "held"


def test_a_node_that_took_part_with_damage_or_ended() -> None:
    fault = h.Fault(kind="flipped bit", target="n2", begin_ns=S, end_ns=2 * S, bit=True)
    assert result(product.check_nodes([fault])) == "held"
    fault.wrong = "n2 took part with a flipped bit in its journal"
    assert result(product.check_nodes([fault])) == "violated"


def test_different_digests_at_one_revision() -> None:
    same = [sample("a", 0, revision=9, digest="x"), sample("b", 0, revision=9, digest="x")]
    split = [sample("a", 0, revision=9, digest="x"), sample("b", 0, revision=9, digest="y")]
    assert result(cluster.check_digests(same)) == "held"
    assert result(cluster.check_digests(split)) == "violated"
    split[1].remembered = "a refusal later"
    assert result(cluster.check_digests(split)) == "held"


def test_liveness_needs_a_leader_and_agreement_in_time() -> None:
    def run(*samples: h.Sample) -> str:
        return result(cluster.check_liveness(h.History(samples=list(samples), healed_ns=10 * S), {"a", "b"}))

    good = (
        sample("a", 11, "leader", 2), sample("a", 12, "leader", 2, 9, "x"), sample("b", 13, "follower", 2, 9, "x"),
    )  # fmt: skip
    assert run(*good) == "held"
    assert run(sample("a", 16, "leader", 2, 9, "x"), good[2]) == "violated"
    assert run(good[0], good[1], sample("b", 26, "follower", 2, 9, "x")) == "violated"
    assert run(good[0], good[1], sample("b", 13, "follower", 2, 8, "w")) == "violated"
    assert result(cluster.check_liveness(h.History(), {"a"})) == "unknown"


def test_someone_removed_and_let_in_again() -> None:
    kick, before, after = op(0, "kick", 1, 2), op(1, "access", 0, 3), op(2, "access", 3, 4)
    denied = op(3, "access", 3, 4, end="refused")
    grant = op(4, "accept", 2.5, 2.6)
    maybe = op(5, "accept", 0.5, 0.6, end="unknown")
    assert result(product.check_removals([kick, before, denied])) == "held"
    assert result(product.check_removals([kick, after])) == "violated"
    assert result(product.check_removals([kick, grant, after])) == "held"
    assert result(product.check_removals([kick, maybe, after])) == "held"


def test_leases_lie_in_two_ways() -> None:
    lives = [h.Life(peer_id="p", from_ns=0, to_ns=20 * S)]

    def seen(at: float, is_seen: bool) -> h.Presence:
        return h.Presence(at_ns=int(at * S), call_ns=int(at * S), peer_id="p", seen=is_seen)

    def run(*presences: h.Presence) -> str:
        return result(product.check_leases(list(presences), lives, gone_within_seconds=5, settle_seconds=2))

    assert run(seen(1, False), seen(10, True), seen(23, True), seen(26, False)) == "held"
    assert run(seen(6, False), seen(8, False), seen(10, False)) == "violated", "it never came"
    assert run(seen(10, True), seen(16, False)) == "violated", "it was dropped"
    assert run(seen(10, False)) == "held", "nobody could be told before"
    assert run(seen(26, True)) == "violated"


def test_downloads_that_end_wrong_or_never() -> None:
    def transfer(**more: Any) -> list[h.Transfer]:
        return [h.Transfer(peer="p", group="g", name="f", begin_ns=0, wanted_sha256="x", **more)]

    assert result(product.check_transfers(transfer(got_sha256="x"))) == "held"
    assert result(product.check_transfers(transfer(got_sha256="y"))) == "violated"
    assert result(product.check_transfers(transfer(exit_code=7))) == "violated"
    assert result(product.check_transfers(transfer(exit_code=7, can_finish=False))) == "held"


def test_waiting_past_the_deadline_while_the_rig_itself_overslept() -> None:
    naps = [h.Load(at_ns=at * S, runnable=20.0, late_seconds=1.5) for at in (2, 4, 30)]
    assert result(product.check_deadlines([op(0, "read", 0, 8.5)], naps)) == "unknown"
    assert result(product.check_deadlines([op(0, "read", 0, 10)], naps)) == "violated"
    before = [h.Load(at_ns=int(9.8 * S), runnable=20.0, late_seconds=3.0)]  # and stood still until 13.3
    assert result(product.check_deadlines([op(0, "read", 10, 18)], before)) == "unknown"
    assert result(product.check_deadlines([op(0, "read", 14, 22)], before)) == "violated"


def test_waiting_past_the_deadline() -> None:
    assert result(product.check_deadlines([op(0, "read", 0, 5.5)])) == "held"
    assert result(product.check_deadlines([op(0, "read", 0, 7)])) == "violated"
    assert (
        result(product.check_deadlines([op(0, "read", 0, 1, end="unknown", end_ns=h.FOREVER_NS)]))
        == "violated"
    )


def test_a_run_that_did_nothing_is_no_proof() -> None:
    fault = h.Fault(kind="kill", target="n1", begin_ns=0, end_ns=S, bit=True)
    busy = h.History(operations=[op(i, "read", 0, 1) for i in range(100)], faults=[fault], end_ns=10 * S)
    assert result(product.check_honesty(busy, 5, {"kill"})) == "held"
    assert result(product.check_honesty(busy, 50, {"kill"})) == "violated"
    assert result(product.check_honesty(busy, 5, {"kill", "pause"})) == "violated"
    fault.bit = False
    assert result(product.check_honesty(busy, 5, {"kill"})) == "violated"


def test_a_history_survives_its_file_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    recorder = h.Recorder(path, seed=7)
    done = recorder.call("c", "publish", "file:f", "n1", "a", 5, "id-1")
    recorder.end(done, "ok", "a", 3)
    recorder.call("c", "publish", "file:f", "n1", "b", 5, "id-2")
    recorder.add(sample("a", 0, "leader", 3))
    written = recorder.close()
    with path.open("ab") as file:
        file.write(b'{"kind":"sam')
    back = h.read(path)
    assert (back.seed, back.operations, back.samples) == (7, written.operations, written.samples)
    assert [o.end for o in back.operations] == ["ok", "unknown"]


def test_a_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    recorder = h.Recorder(tmp_path / "h.jsonl", 7)
    recorder.add(h.Fault(kind="kill one", target="n1", begin_ns=1, end_ns=2, bit=True, gone_ns=(1, 2)))
    recorder.add(h.Load(at_ns=1, runnable=2.5, late_seconds=0.1))
    done = recorder.call("c", "publish", "file:g:f", "n1", "x", 5.0, "id")
    recorder.end(done, "ok", "", 3)
    recorder.call("c", "read", "file:g:f", "n1", "", 5.0)
    written = recorder.close()
    assert h.read(tmp_path / "h.jsonl") == written
