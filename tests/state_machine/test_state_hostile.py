"""Bytes of any kind never raise, never change anything by halves; and the machine is pure."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from state_worlds import COMMANDS, HISTORY, copy_of, derived, request_hash, request_id, run

from state_machine import codec, moments, queries
from state_machine import commands as c
from state_machine.machine import _RULES, StateMachine
from state_machine.outcomes import Applied, Code, Refused

ROOT = Path(__file__).parents[2] / "state_machine"


def populated() -> StateMachine:
    machine = StateMachine(lambda change: None)
    for command in HISTORY:
        run(machine, command)
    return machine


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.binary(max_size=300) | _plain.map(msgspec.msgpack.encode), max_size=5))
def test_random_bytes_are_refused(junk: list[bytes]) -> None:
    machine = populated()
    before = machine.digest()
    for outcome in machine.apply(junk):
        assert isinstance(outcome, Refused)
        assert outcome.code in (Code.MALFORMED, Code.UNSUPPORTED)
    assert machine.digest() == before


_tags = [command.__struct_config__.tag for command in _RULES]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_tags), st.lists(_plain, max_size=8), st.text(max_size=40), st.text(max_size=40))
def test_a_known_tag_with_anything_behind_it(tag: str, fields: list[Any], caller: str, id_: str) -> None:
    machine = populated()
    machine.apply([msgspec.msgpack.encode([[tag, *fields], caller, id_, b"h" * 32])])
    assert derived(copy_of(machine).state) == derived(machine.state)


_texts = st.text(max_size=20) | st.sampled_from(["ann", "g", "x", "g/x", "/", "", "a" * 70])
_SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    str: _texts,
    int: st.integers(-(2**63), 2**64 - 1) | st.integers(-1, 3),
    bool: st.booleans(),
    bytes: st.binary(max_size=40),
}


def _wild(command: type[c.Command]) -> st.SearchStrategy[c.Command]:
    """Any values of the right types, whatever they mean."""
    values = {field.name: _value(field.type) for field in msgspec.structs.fields(command)}
    return st.builds(command, **values)


def _value(kind: Any) -> st.SearchStrategy[Any]:
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    args = getattr(kind, "__args__", ())
    if getattr(kind, "__origin__", None) is tuple:
        if args[-1] is Ellipsis:
            return st.lists(_value(args[0]), max_size=4).map(tuple)
        return st.tuples(*(_value(arg) for arg in args))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{f.name: _value(f.type) for f in msgspec.structs.fields(kind)})
    return st.sampled_from(args)  # a Literal


@settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(list(_RULES)).flatmap(_wild) | COMMANDS, min_size=1, max_size=12))
def test_wild_values_of_the_right_types(commands: list[Any]) -> None:
    machine = populated()
    outcomes = machine.apply([codec.encode(command) for command in commands])
    assert len(outcomes) == len(commands)
    loaded = copy_of(machine)
    assert loaded.digest() == machine.digest()
    assert derived(loaded.state) == derived(machine.state)


@settings(max_examples=100, deadline=None)
@given(COMMANDS)
def test_a_truncated_command_is_malformed(command: c.AnyCommand) -> None:
    machine = populated()
    data = codec.encode(command, caller="ann", request_id=request_id(1), request_hash=request_hash("x"))
    before = machine.digest()
    outcomes = machine.apply([data[:cut] for cut in range(len(data))] + [data + b"\x00"])
    assert {outcome.code for outcome in outcomes if isinstance(outcome, Refused)} == {Code.MALFORMED}
    assert not any(isinstance(outcome, Applied) for outcome in outcomes)
    assert machine.digest() == before


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array said to hold four thousand million
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x95\x93\xaepeers.announce\xdd\xff\xff\xff\xff" + b"\xc0" * 1000,
        b"\x91" * 500_000,  # nested deeper than any stack
        b"\x95\x91" + b"\x91" * 500_000,
        b"\x95\x92\xabpeers.renew\x91" + b"\x91" * 500_000,
        b"\x81" * 300_000,
        b"\x00" * (2 << 20),
    ],
)
def test_huge_and_deep(data: bytes) -> None:
    [outcome] = StateMachine().apply([data])
    assert isinstance(outcome, Refused)
    assert len(outcome.message) < 400


def test_a_newer_entry_says_so() -> None:
    newer = msgspec.msgpack.encode([["user.rename", "ann", "bob"], "", "", b"", 2, "more"])
    known = msgspec.msgpack.encode([["policy.set", "open"], "", "", b"", 2])
    for outcome in StateMachine().apply([newer, known]):
        assert isinstance(outcome, Refused)
        assert outcome.code == Code.UNSUPPORTED


def test_fields_appended_by_a_newer_node_are_ignored() -> None:
    data = msgspec.msgpack.encode([["policy.set", "invitation", "new field"], "", "", b"", 1, "new"])
    machine = StateMachine()
    assert machine.apply([data]) == [Applied(1)]
    assert queries.registration(machine.state) == "invitation"


def test_queries_take_any_text() -> None:
    """Texts of a URL, lone surrogates among them."""
    state = populated().state
    for text in ("\udcff", "a\udcffb", "", "g/x", "x" * 10_000, "\x00"):
        assert queries.membership(state, text, "ann") is None
        assert queries.membership(state, "g", text) is None
        assert queries.show_group(state, text, text) is None
        assert queries.show_file(state, "g", text) is None
        assert queries.swarm_peers(state, "g", "x", text) is None or text == ""
        assert queries.swarm_peers(state, text, text, text) is None
        assert queries.peer(state, text) is None
        assert queries.revocations(state, text) == []
        assert not queries.session_valid(state, text, text, 1)
        assert queries.signing_key(state, text) is None
        assert queries.group_log(state, text) == ()


def test_every_command_has_a_rule() -> None:
    assert set(_RULES) == set(c.AnyCommand.__args__)
    assert len(set(_tags)) == len(_tags)


def test_times_of_any_size_can_be_written() -> None:
    assert moments.rfc3339(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
    assert moments.rfc3339(-(2**63)) == "1970-01-01T00:00:00.000Z"
    assert moments.rfc3339(2**64) == "9999-12-31T23:59:59.999Z"


FORBIDDEN = {
    "aiohttp", "asyncio", "cluster", "concurrent", "http", "io", "logging", "multiprocessing", "os", "pathlib",
    "peer", "platform", "pysyncobj", "random", "secrets", "select", "signal", "socket", "ssl", "structlog",
    "subprocess", "sys", "tempfile", "threading", "time", "trimaran", "uuid",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_pure(path: Path) -> None:
    """No clocks, no chance, no input or output, no order that depends on a hash."""
    tree = ast.parse(path.read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input", "id", "hash", "exec", "eval", "__import__"}
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"now", "utcnow", "today"}
    assert imported & FORBIDDEN == set()
