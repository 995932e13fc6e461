"""The search agrees with a brute-force one on small histories, and says no to wrong ones."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from chaos_tests.checkers import linearizability as lin
from chaos_tests.history import FOREVER_NS, Operation


def op(
    number: int, name: str, call: int, end_at: int, value: str = "", end: str = "ok", output: object = None
) -> Operation:
    return Operation(
        id=number, client="c", name=name, key="file:f", node="n1", input=value, call_ns=call, deadline_ns=FOREVER_NS,
        end=end, end_ns=FOREVER_NS if end == "unknown" else end_at, output=output,
    )  # fmt: skip


def brute(operations: list[Operation]) -> bool:
    """Try every order of every subset that has all closed operations."""
    relevant = [o for o in operations if o.end != "fail"]
    closed = [o for o in relevant if not o.open]
    pending = [o for o in relevant if o.open]
    for mask in range(1 << len(pending)):
        chosen = closed + [o for i, o in enumerate(pending) if mask >> i & 1]
        for order in permutations(chosen):
            if any(b.end_ns < a.call_ns for i, a in enumerate(order) for b in order[i + 1 :]):
                continue
            state: lin.State | None = lin.ABSENT
            for operation in order:
                state = lin.file_model(state, operation)
                if state is None:
                    break
            else:
                return True
    return False


VALUES = ("a", "b")


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    operations = []
    for number in range(draw(st.integers(0, 6))):
        call = draw(st.integers(0, 12))
        end_at = call + draw(st.integers(1, 6))
        name = draw(st.sampled_from(["publish", "replace", "remove", "read"]))
        value = draw(st.sampled_from(VALUES))
        end = draw(st.sampled_from(["ok", "ok", "ok", "refused", "unknown", "fail"]))
        output: object = None
        if name == "read":
            end, output = "ok", draw(st.sampled_from([*VALUES, lin.ABSENT]))
        elif end == "refused":
            if name == "replace":
                end = "ok"
            output = "conflict" if name == "publish" else "not_found"
        operations.append(op(number, name, call, end_at, value, end, output))
    return operations


@settings(max_examples=400, deadline=None)
@given(histories())
def test_agrees_with_trying_everything(operations: list[Operation]) -> None:
    verdict = lin.check(operations, lin.ABSENT, lin.file_model, 10)
    assert verdict.result == ("held" if brute(operations) else "violated")


def test_a_stale_read_is_a_violation() -> None:
    verdict = lin.check(
        [op(0, "replace", 0, 1, "a"), op(1, "replace", 2, 3, "b"), op(2, "read", 4, 5, output="a")],
        lin.ABSENT, lin.file_model, 5,
    )  # fmt: skip
    assert verdict.result == "violated"
    assert 2 in verdict.operations


def test_a_lost_write_is_a_violation() -> None:
    verdict = lin.check(
        [op(0, "replace", 0, 1, "a"), op(1, "read", 2, 3, output=lin.ABSENT)], lin.ABSENT, lin.file_model, 5
    )
    assert verdict.result == "violated"


def test_an_unknown_write_may_take_effect_late_or_never() -> None:
    late = [
        op(0, "replace", 0, 0, "a", end="unknown"),
        op(1, "read", 5, 6, output=lin.ABSENT),
        op(2, "read", 7, 8, output="a"),
    ]
    assert lin.check(late, lin.ABSENT, lin.file_model, 5).result == "held"
    undone = [*late, op(3, "read", 9, 10, output=lin.ABSENT)]
    assert lin.check(undone, lin.ABSENT, lin.file_model, 5).result == "violated"


def test_a_failed_write_that_shows_is_a_violation() -> None:
    operations = [op(0, "replace", 0, 1, "a", end="fail"), op(1, "read", 2, 3, output="a")]
    assert lin.check(operations, lin.ABSENT, lin.file_model, 5).result == "violated"


def test_out_of_time_is_unknown_never_a_pass() -> None:
    # Many concurrent writes and a read of something never written: exponential, and no budget.
    operations = [op(i, "replace", 0, 100, f"v{i}") for i in range(24)]
    operations += [op(100 + i, "read", 1, 99, output=f"v{i}") for i in range(24)]
    operations.append(op(999, "read", 0, 100, output="never"))
    assert lin.check(operations, lin.ABSENT, lin.file_model, 0.2).result == "unknown"


def test_a_thousand_operations_of_five_clients_are_checked_in_time() -> None:
    operations = []
    now, value = 0, lin.ABSENT
    for number in range(1000):
        if number % 3:
            operations.append(op(number, "read", now, now + 4, output=value))
        else:
            value = f"v{number}"
            operations.append(op(number, "replace", now, now + 1, value))
        now += 2
    assert lin.check(operations, lin.ABSENT, lin.file_model, 20).result == "held"


def test_many_hours_of_one_key_are_checked_in_time() -> None:
    """What is kept of each step must not grow with the history."""
    operations, value = [], lin.ABSENT
    for number in range(0, 40_000, 4):
        at = number * 10
        operations.append(op(number, "read", at, at + 9, output=value))
        if number % 400 == 0:
            operations.append(op(number + 1, "replace", at, 0, f"lost {number}", end="unknown"))
        value = f"v{number}"
        operations.append(op(number + 2, "replace", at + 10, at + 18, value))
        operations.append(op(number + 3, "read", at + 12, at + 30, output=value))
    assert lin.check(operations, lin.ABSENT, lin.file_model, 30).result == "held"


def test_membership_refusals_are_observations() -> None:
    def step(number: int, name: str, at: int, end: str = "ok", output: object = None) -> Operation:
        return op(number, name, at, at + 1, "", end, output)

    good = [
        step(0, "request", 0), step(1, "request", 2), step(2, "accept", 4), step(3, "accept", 6, "refused", "conflict"),
        step(4, "read", 8, output="member"), step(5, "kick", 10), step(6, "read", 12, output="none"),
    ]  # fmt: skip
    assert lin.check(good, "none", lin.membership_model, 5).result == "held"
    lost = [step(0, "request", 0), step(1, "accept", 2), step(2, "kick", 4, "refused", "not_found")]
    assert lin.check(lost, "none", lin.membership_model, 5).result == "violated"
