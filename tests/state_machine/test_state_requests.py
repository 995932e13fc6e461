"""Request ids: the first answer again, never a second execution, and an honest "too old"."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_worlds import copy_of, request_hash, request_id, run

from state_machine import codec, limits
from state_machine import commands as c
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied, Code, Outcome, Refused

NOW = 1_700_000_000_000


def register(user: str, at_ms: int = NOW) -> c.RegisterUser:
    return c.RegisterUser(user, "h", at_ms)


def test_a_repeated_request_gets_the_first_answer_and_changes_nothing() -> None:
    machine = StateMachine()
    request = {"caller": "ann", "request_id": request_id(NOW), "request_hash": request_hash("a")}
    first = run(machine, register("ann"), **request)
    run(machine, register("bob"))
    digest = machine.digest()
    again = run(machine, register("ann"), **request)
    assert again == msgspec.structs.replace(first, replayed=True)
    assert machine.digest() == digest


def test_a_refusal_is_remembered_too() -> None:
    machine = StateMachine()
    request = {"caller": "ann", "request_id": request_id(NOW), "request_hash": request_hash("a")}
    first = run(machine, c.RequestJoin("g", "ann", NOW), **request)
    run(machine, register("ann"))
    run(machine, c.CreateGroup("g", "ann", NOW))
    run(machine, register("bob"))
    again = run(machine, c.RequestJoin("g", "ann", NOW), **request)
    assert isinstance(again, Refused)
    assert again == msgspec.structs.replace(first, replayed=True)


def test_another_body_under_the_same_id_is_refused() -> None:
    machine = StateMachine()
    request = {"caller": "ann", "request_id": request_id(NOW)}
    run(machine, register("ann"), **request, request_hash=request_hash("a"))
    other = run(machine, register("bob"), **request, request_hash=request_hash("b"))
    assert isinstance(other, Refused)
    assert other.code == Code.REQUEST_MISMATCH
    assert machine.revision == 1


def test_an_id_is_the_callers_own() -> None:
    machine = StateMachine()
    request = {"request_id": request_id(NOW), "request_hash": request_hash("a")}
    run(machine, register("ann"), **request, caller="ann")
    other = run(machine, register("bob"), **request, caller="bob")
    assert isinstance(other, Applied)
    assert not other.replayed


@pytest.mark.parametrize(
    "bad", ["x", request_id(NOW).upper(), request_id(NOW)[:14] + "4" + request_id(NOW)[15:], "\ud7ff" * 36]
)
def test_an_id_that_is_no_uuid7_is_refused(bad: str) -> None:
    machine = StateMachine()
    outcome = run(machine, register("ann"), caller="ann", request_id=bad, request_hash=request_hash("a"))
    assert isinstance(outcome, Refused)
    assert (outcome.code, outcome.field) == (Code.INVALID, "Idempotency-Key")
    assert machine.revision == 0


@pytest.mark.parametrize("request_hash_", [b"", b"x" * 31, b"x" * 33])
def test_an_id_without_the_hash_of_its_request_is_refused(request_hash_: bytes) -> None:
    machine = StateMachine()
    outcome = run(
        machine, register("ann"), caller="ann", request_id=request_id(NOW), request_hash=request_hash_
    )
    assert isinstance(outcome, Refused)
    assert outcome.code == Code.INVALID


def test_an_id_from_the_future_is_refused_and_may_come_again_later() -> None:
    machine = StateMachine()
    ahead = NOW + limits.REQUEST_ID_AHEAD_MS_MAX
    request = {"caller": "ann", "request_hash": request_hash("a")}
    late = run(machine, register("ann"), request_id=request_id(ahead + 1), **request)
    assert isinstance(late, Refused)
    assert late.code == Code.INVALID
    assert isinstance(run(machine, register("ann"), request_id=request_id(ahead), **request), Applied)


def test_what_was_forgotten_is_too_old_for_its_caller_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_KEPT_MAX", 2)
    machine = StateMachine()

    def ask(caller: str, minted_ms: int) -> object:
        outcome = run(
            machine,
            c.SetPolicy("open"),
            caller=caller,
            request_id=request_id(minted_ms),
            request_hash=request_hash("a"),
        )
        return outcome.code if isinstance(outcome, Refused) else outcome.replayed

    assert [ask("ann", 500), ask("ann", 600), ask("ann", 700)] == [False, False, False]
    assert ask("ann", 600) is True
    assert [ask("ann", 500), ask("ann", 499)] == [Code.REQUEST_TOO_OLD] * 2
    assert ask("bob", 499) is False, "ann's clock is not bob's"
    assert ask("ann", 600) == Code.REQUEST_TOO_OLD, "it was forgotten meanwhile"
    assert ask("ann", 601) is False, "minted after what was forgotten: certainly not executed"


def test_the_latest_of_what_was_forgotten_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids do not come in the order of their minting."""
    monkeypatch.setattr(limits, "REQUESTS_KEPT_MAX", 3)
    machine = StateMachine()
    run(machine, register("ann"))

    def ask(minted_ms: int) -> Outcome:
        return run(
            machine,
            c.ChangePassword("ann", "h", NOW),
            caller="ann",
            request_id=request_id(minted_ms),
            request_hash=request_hash("a"),
        )

    for minted_ms in (900, 500, 1_000, 1_001, 1_002):
        assert isinstance(ask(minted_ms), Applied)
    again = ask(900)
    assert isinstance(again, Refused)
    assert again.code == Code.REQUEST_TOO_OLD


def test_outcomes_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_KEPT_BYTES_MAX", 5_000)
    machine = StateMachine()
    for n in range(100):
        run(
            machine,
            c.RequestJoin("g" * 60, "nobody", NOW),
            caller="ann",
            request_id=request_id(NOW + n),
            request_hash=request_hash("a"),
        )
        assert machine.state.requests.kept_bytes <= 5_000
    assert 5 < len(machine.state.requests) < 20


def test_pruning_folds_old_callers_into_one_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUESTS_KEPT_MAX", 1)
    machine = StateMachine()

    def ask(caller: str, minted_ms: int) -> bool:
        outcome = run(
            machine,
            c.SetPolicy("open"),
            caller=caller,
            request_id=request_id(minted_ms),
            request_hash=request_hash("a"),
        )
        return isinstance(outcome, Applied)

    assert ask("ann", 500)
    assert ask("bob", 900)
    assert ask("cia", 1_000)
    assert len(machine.state.requests.forgotten) == 2
    run(machine, c.Prune(800))
    assert len(machine.state.requests.forgotten) == 2, "a slow clock is no reason to be refused"
    run(machine, c.Prune(800 + limits.REQUEST_MARKS_KEPT_MS))
    assert len(machine.state.requests.forgotten) == 1
    assert not ask("ann", 500), "still never executed again"
    assert ask("ann", 501)
    assert not ask("bob", 900)


# A client that retries every request an arbitrary number of times, in any order, through snapshots.
@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.integers(1, 12), st.booleans()), max_size=60))
def test_no_request_is_ever_executed_twice(asked: list[tuple[str, int, bool]]) -> None:
    usual, limits.REQUESTS_KEPT_MAX = limits.REQUESTS_KEPT_MAX, 3
    try:
        machine = StateMachine()
        run(machine, register("ann"))
        executed: set[tuple[str, int]] = set()
        for caller, number, through_snapshot in asked:
            before = machine.revision
            outcome = run(
                machine,
                c.ChangePassword("ann", f"h{number}", NOW),
                caller=caller,
                request_id=request_id(number),
                request_hash=request_hash(str(number)),
            )
            if machine.revision > before:
                assert (caller, number) not in executed
                executed.add((caller, number))
            elif isinstance(outcome, Applied):
                assert outcome.replayed
                assert (caller, number) in executed
            else:
                assert outcome.code == Code.REQUEST_TOO_OLD
            if through_snapshot:
                loaded = copy_of(machine)
                assert loaded.digest() == machine.digest()
                machine = loaded
    finally:
        limits.REQUESTS_KEPT_MAX = usual


def test_nothing_secret_is_kept() -> None:
    machine = StateMachine()
    command = c.RegisterUser("ann", "the-password-hash", NOW)
    run(machine, command, caller="ann", request_id=request_id(NOW), request_hash=request_hash("a"))
    rows = list(machine.state.requests)
    assert len(rows) == 1
    assert b"the-password-hash" not in rows[0].answer + rows[0].key


def test_the_clusters_own_commands_need_no_id() -> None:
    machine = StateMachine()
    assert run(machine, register("ann")) == Applied(1, {"user": "ann"})
    assert len(machine.state.requests) == 0


def test_encoding_gives_back_the_entry() -> None:
    entry = codec.decode(
        codec.encode(register("ann"), caller="ann", request_id=request_id(1), request_hash=b"h" * 32)
    )
    assert entry == c.Entry(register("ann"), "ann", request_id(1), b"h" * 32, 1)
