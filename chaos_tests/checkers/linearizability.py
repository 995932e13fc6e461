"""Linearizability of one key's history: Wing and Gong's search with Lowe's memo ("Testing for
linearizability", 2017), partitioned by key (Horn and Kroening, P-compositionality).

The search takes operations in an order that respects real time, one at a time, through a sequential
model; a state already reached with the same set of operations taken is not visited again. Meant for at
most 5 clients and about 1,000 operations a key; when the budget ends first, the verdict is `unknown`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import FOREVER_NS, Operation

State = Hashable
# The state after the operation, or None when its output contradicts the state.
Step = Callable[[State, Operation], State | None]

NAME = "linearizability"


def check(operations: Sequence[Operation], initial: State, step: Step, budget_seconds: float) -> Verdict:
    """Check one key. `fail` operations are left out: they certainly did not happen."""
    relevant = [operation for operation in operations if operation.end != "fail"]
    closed = sorted((o for o in relevant if not o.open), key=lambda o: o.call_ns)
    pending = sorted((o for o in relevant if o.open), key=lambda o: o.call_ns)
    ordered = closed + pending
    search = _Search(ordered, len(closed), step, time.monotonic() + budget_seconds)
    finished = search.run(initial)
    if finished is None:
        return Verdict(
            name=NAME, result="unknown", checked=len(closed),
            message=f"out of time after {budget_seconds:.0f} s; the longest good prefix has {search.best_count} operations",
        )  # fmt: skip
    if finished:
        return held(NAME, len(closed))
    bad = search.stuck_on()
    return violated(
        NAME,
        len(closed),
        f"no order explains operation {bad.id}: {bad.name}({bad.input!r}) -> {bad.end} {bad.output!r}",
        first_bad_ns=bad.call_ns,
        operations=[ordered[i].id for i in search.best_order] + [bad.id],
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    """Which operations have been taken: all closed ones before `base`, of those from there on the bits of `rest`, and
    of the open ones those of `open`. Small however long the history is."""

    base: int = 0
    rest: int = 0
    open: int = 0

    def with_closed(self, index: int) -> _Taken:
        rest = self.rest | 1 << (index - self.base)
        whole = (~rest & (rest + 1)).bit_length() - 1
        return _Taken(self.base + whole, rest >> whole, self.open)

    def with_open(self, number: int) -> _Taken:
        return _Taken(self.base, self.rest, self.open | 1 << number)


class _Search:
    """`ordered`: the closed operations by their call, then the open ones."""

    def __init__(self, ordered: list[Operation], closed_count: int, step: Step, stop_at: float) -> None:
        self.ordered, self.closed_count, self.step, self.stop_at = ordered, closed_count, step, stop_at
        self.open = ordered[closed_count:]
        self.best_order: list[int] = []

    @property
    def best_count(self) -> int:
        return len(self.best_order)

    def run(self, initial: State) -> bool | None:
        begin = _Taken()
        seen: set[tuple[_Taken, State]] = {(begin, initial)}
        # Each frame: (what is taken, state, iterator over the operations that may come next).
        stack = [(begin, initial, self._candidates(begin))]
        order: list[int] = []
        rounds = 0
        while stack:
            rounds += 1
            if not rounds & 1023 and time.monotonic() > self.stop_at:
                self._note(order)
                return None
            taken, state, candidates = stack[-1]
            if taken.base == self.closed_count:
                return True
            for index in candidates:
                after = self.step(state, self.ordered[index])
                if after is None:
                    continue
                number = index - self.closed_count
                then = taken.with_closed(index) if number < 0 else taken.with_open(number)
                if (then, after) in seen:
                    continue
                seen.add((then, after))
                stack.append((then, after, self._candidates(then)))
                order.append(index)
                break
            else:
                self._note(order)
                stack.pop()
                if order:
                    order.pop()
        return False

    def _note(self, order: list[int]) -> None:
        """Before going back: the longest good prefix so far."""
        if len(order) > len(self.best_order):
            self.best_order = order.copy()

    def _candidates(self, taken: _Taken) -> Iterator[int]:
        """Operations not taken that were called before every untaken closed one ended: a next one must
        not come after the end of another that has yet to be taken."""
        first_end = FOREVER_NS
        found: list[int] = []
        for index in range(taken.base, self.closed_count):
            if taken.rest >> (index - taken.base) & 1:
                continue
            operation = self.ordered[index]
            if operation.call_ns > first_end:
                break  # called after an untaken one ended, and so are all later ones
            first_end = min(first_end, operation.end_ns)
            found.append(index)
        result = [i for i in found if self.ordered[i].call_ns <= first_end]
        for number, operation in enumerate(self.open):
            if operation.call_ns > first_end:
                break
            if not taken.open >> number & 1:
                result.append(self.closed_count + number)
        return iter(result)

    def stuck_on(self) -> Operation:
        taken = set(self.best_order)
        left = [self.ordered[i] for i in range(self.closed_count) if i not in taken]
        return min(left, key=lambda operation: operation.end_ns)


def check_keys(
    operations: Sequence[Operation], models: dict[str, tuple[State, Step]], budget_seconds: float
) -> list[Verdict]:
    """Check every key by the model of its kind: the part of the key before the first colon."""
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        kind = operation.key.partition(":")[0]
        if kind in models:
            by_key[operation.key].append(operation)
    verdicts: list[Verdict] = []
    stop_at = time.monotonic() + budget_seconds
    for key, group in sorted(by_key.items()):
        initial, step = models[key.partition(":")[0]]
        verdict = check(group, initial, step, max(0.05, stop_at - time.monotonic()))
        verdict.message = f"{key}: {verdict.message}" if verdict.message else key
        verdicts.append(verdict)
    return verdicts


# --- the sequential models -----------------------------------------------------------------------
# A refusal is an observation too: it must be explained by the state as much as a success.

ABSENT = ""


def file_model(state: State, operation: Operation) -> State | None:
    """One shared file's manifest. State: manifest id, or ABSENT.

    publish(input id): ok where absent or the same; refused "conflict" where another is there.
    replace(input id): always ok. remove: ok where present; refused "not_found" where absent.
    read: output is the id, or ABSENT.
    """
    name, value, end, output = operation.name, operation.input, operation.end, operation.output
    if name == "read":
        return state if end != "ok" or output == state else None
    if end == "refused":
        if name == "publish" and output == "conflict":
            return state if state not in (ABSENT, value) else None
        if name == "remove" and output == "not_found":
            return state if state == ABSENT else None
        return state  # refused for a reason this key does not hold (rights): it says nothing here
    if name == "publish":
        if state in (ABSENT, value):
            return value
        return state if end == "unknown" else None
    if name == "replace":
        return value
    if name == "remove":
        return ABSENT if state != ABSENT or end == "unknown" else None
    raise ValueError(f"the file model knows no operation {name!r}")


def membership_model(state: State, operation: Operation) -> State | None:
    """One person in one group. State: "none", "requested" or "member".

    request: ok where none or requested (asking twice is not two requests), refused "conflict" for a
    member. accept: ok where requested; refused "not_found" where none, "conflict" where member. leave,
    kick: ok where member; refused "not_found" or "denied" otherwise. withdraw: ok where requested.
    read: output is the state; "member" or not ("none" stands for both others).
    """
    name, end, output = operation.name, operation.end, operation.output
    if name == "read":
        if end != "ok":
            return state
        return state if (output == "member") == (state == "member") else None
    changes = {
        "request": ({"none", "requested"}, "requested"),
        "accept": ({"requested"}, "member"),
        "kick": ({"member"}, "none"),
        "leave": ({"member"}, "none"),
        "withdraw": ({"requested"}, "none"),
    }
    if name not in changes:
        raise ValueError(f"the membership model knows no operation {name!r}")
    allowed, after = changes[name]
    if end == "ok":
        return after if state in allowed else None
    if end == "refused":
        return None if state in allowed else state
    return after if state in allowed else state
