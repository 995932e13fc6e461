"""Snapshots: the same state after any cut, nothing after damage, small steps, frozen while written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from state_worlds import (
    COMMANDS,
    GROUPS,
    HISTORY,
    NAMES,
    USERS,
    copy_of,
    derived,
    digest_of,
    load,
    request_hash,
    request_id,
    run,
    view,
)

from state_machine import codec, queries, snapshot
from state_machine import commands as c
from state_machine.machine import StateMachine
from state_machine.model import TABLES, State
from state_machine.outcomes import Applied
from state_machine.tables import Nest, Table

ROOT = Path(__file__).parents[2]


def populated() -> StateMachine:
    machine = StateMachine()
    for number, command in enumerate(HISTORY):
        outcome = run(
            machine,
            command,
            caller="ann",
            request_id=request_id(number + 1),
            request_hash=request_hash(str(number)),
        )
        assert isinstance(outcome, Applied), outcome
    return machine


@settings(max_examples=60, deadline=None)
@given(
    st.lists(COMMANDS, max_size=30),
    st.lists(COMMANDS, max_size=30),
    st.lists(st.integers(1, 997), max_size=9),
)
def test_snapshot_and_tail_are_the_whole(
    head: list[c.AnyCommand], tail: list[c.AnyCommand], cuts: list[int]
) -> None:
    machine = populated()
    machine.apply([codec.encode(command) for command in head])
    frozen = machine.freeze()
    outcomes = machine.apply([codec.encode(command) for command in tail])  # while it is encoded
    data = b"".join(frozen.slices())
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    loaded = load([*pieces, data])
    assert loaded.apply([codec.encode(command) for command in tail]) == outcomes
    assert loaded.digest() == machine.digest()
    assert derived(loaded.state) == derived(machine.state)
    assert view(loaded) == view(machine)


def test_every_cut_loads_the_same() -> None:
    machine = populated()
    data = b"".join(machine.freeze().slices())
    digest = machine.digest()
    for cut in range(1, len(data), 7):
        assert load([data[:cut], data[cut:]]).digest() == digest
    assert load([data[n : n + 1] for n in range(len(data))]).digest() == digest


def test_small_slices_load_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_SLICE_ROWS", 2)
    monkeypatch.setattr(snapshot, "_FAT_SLICE_ROWS", 1)
    machine = populated()
    slices = list(machine.freeze().slices())
    assert len(slices) > 25
    loaded = load(slices)
    assert loaded.digest() == machine.digest()
    assert derived(loaded.state) == derived(machine.state)


def test_what_is_cut_off_damaged_or_foreign_is_refused_and_changes_nothing() -> None:
    machine = populated()
    data = b"".join(machine.freeze().slices())
    target = StateMachine()
    run(target, c.RegisterUser("zoe", "h", 1))
    before = target.digest()
    cases = [data[:cut] for cut in range(0, len(data), 5)]
    for at in range(0, len(data), 3):
        cases.append(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
    cases += [data + b"x", data + data, b"", b"garbage" * 100, data[len(snapshot.MAGIC) :], data[:17] + data]
    for case in cases:
        with pytest.raises(ValueError, match=r"."):
            load([case], into=target)
    assert target.digest() == before


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_hostile_frames_raise_nothing_but_value_errors(junk: bytes) -> None:
    for section in ("state", "holdings", "users", "requests", "end", "unknown"):
        name = section.encode()
        payload = bytes([len(name)]) + name + junk
        frame = snapshot._HEAD.pack(len(payload), snapshot.crc32(payload)) + payload
        with pytest.raises(ValueError, match=r"."):
            load([snapshot.MAGIC + frame])


def test_a_newer_format_says_so() -> None:
    with pytest.raises(ValueError, match="newer version"):
        load([b"trimaran state 2\n"])


def test_freezing_twice_gives_two_moments() -> None:
    machine = populated()
    first, first_digest = machine.freeze(), machine.digest()
    run(machine, c.KickMember("g", "bob", "ann", 9, 99))
    second, second_digest = machine.freeze(), machine.digest()
    run(machine, c.DeleteGroup("g", "ann", 9, 99))
    assert digest_of(second) == second_digest
    assert digest_of(first) == first_digest
    assert digest_of(first) == first_digest, "a frozen state can be encoded again"
    assert len({first_digest, second_digest, machine.digest()}) == 3


def test_restoring_tells_whoever_follows_changes() -> None:
    restored = []
    machine = StateMachine(on_restore=lambda: restored.append(machine.revision))
    run(machine, c.RegisterUser("zoe", "h", 1))
    other = populated()
    load(list(other.freeze().slices()), into=machine)
    assert restored == [other.revision]
    assert machine.digest() == other.digest()
    for _ in range(200):  # the replaced state is freed meanwhile, piece by piece
        machine.apply([])
    assert not machine._discarded
    assert machine.digest() == other.digest()


def test_a_replaced_state_that_is_still_frozen_is_not_torn_down() -> None:
    machine = populated()
    frozen, digest = machine.freeze(), machine.digest()
    run(machine, c.RegisterUser("zoe", "h", 1))
    load(list(StateMachine().freeze().slices()), into=machine)
    while machine._discarded:
        machine.apply([])
    assert digest_of(frozen) == digest


def test_every_table_has_a_way_back() -> None:
    assert set(TABLES) == set(snapshot._PUTS) | set(snapshot._NESTED_PUTS) | snapshot._PLAIN_NESTS
    nests = {name for name in TABLES if isinstance(getattr(State(), name), Nest)}
    assert nests == set(snapshot._NESTED_PUTS) | snapshot._PLAIN_NESTS


def test_derived_data_is_what_a_loader_would_rebuild() -> None:
    machine = populated()
    assert derived(copy_of(machine).state) == derived(machine.state)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from hypothesis import given, settings, seed, Phase
from hypothesis import strategies as st
from state_worlds import COMMANDS, HISTORY, run, copy_of
from state_machine.machine import StateMachine
import hashlib
total = hashlib.sha256()
events = hashlib.sha256()
for name in {names!r}:
    machine = StateMachine(lambda change: events.update(repr(change).encode()))
    for command in HISTORY:
        run(machine, command)
    for data in open(name, "rb").read().split(b"<>"):
        total.update(repr(machine.apply([data])).encode())
    total.update(machine.digest())
    total.update(b"".join(machine.freeze().slices()))
print(total.hexdigest(), events.hexdigest(), hash("x"))
"""


def test_the_same_entries_give_the_same_state_under_any_hash_seed(tmp_path: Path) -> None:
    """Outcomes, events, digest, and the very bytes of the snapshot."""
    names = []

    @settings(max_examples=15, database=None, deadline=None)
    @given(st.lists(COMMANDS, min_size=40, max_size=80))
    def write(commands: list[c.AnyCommand]) -> None:
        path = tmp_path / str(len(names))
        path.write_bytes(b"<>".join(codec.encode(command) for command in commands))
        names.append(str(path))

    write()
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(ROOT), names=names)
    printed = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("0", "1", "4242")
    ]
    assert len({tuple(line[:2]) for line in printed}) == 1
    assert len({line[2] for line in printed}) == 3, "the seeds took effect"


def test_steps_stay_small_with_many_rows() -> None:
    """Counted in rows, not in seconds: so it fails for the reason it names."""
    machine = StateMachine()
    entries = [codec.encode(c.RegisterUser(f"user{n}", "h", 1)) for n in range(5_000)]
    entries.append(codec.encode(c.CreateGroup("g", "user0", 1)))
    for n in range(1, 900):
        entries.append(codec.encode(c.RequestJoin("g", f"user{n}", 1)))
        entries.append(codec.encode(c.AcceptRequest("g", f"user{n}", "user0", 1)))
    for n in range(3_000):
        entries.append(
            codec.encode(
                c.PublishFile("g", f"f{n}", "file", 1, 1, 16384, "sha256", f"{n:064x}", False, "user1", 1, 1)
            )
        )
    assert all(isinstance(outcome, Applied) for outcome in machine.apply(entries))
    slices = list(machine.freeze().slices())
    assert max(map(len, slices)) < 400_000
    assert load(slices).digest() == machine.digest()
    assert queries.counts(machine.state)["members"] == 900


# --- tables alone ---------------------------------------------------------------------------------

_keys = st.sampled_from([*USERS, *GROUPS, *NAMES])


class TablesAgainstDicts(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table: Table[int] = Table(2)
        self.nest: Nest[int] = Nest(2)
        self.flat: dict[str, int] = {}
        self.nested: dict[tuple[str, str], int] = {}
        self.frozen: list[tuple[object, object, dict[str, int], dict[tuple[str, str], int]]] = []

    @rule(key=_keys, inner=_keys, value=st.integers())
    def put(self, key: str, inner: str, value: int) -> None:
        self.table.put(key, value)
        self.flat[key] = value
        self.nest.put(key, inner, value)
        self.nested[key, inner] = value

    @rule(key=_keys, inner=_keys)
    def drop(self, key: str, inner: str) -> None:
        if key in self.flat:
            assert self.table.drop(key) == self.flat.pop(key)
        if (key, inner) in self.nested:
            assert self.nest.drop(key, inner) == self.nested.pop((key, inner))

    @rule(key=_keys, inners=st.sets(_keys, min_size=1), value=st.integers())
    def put_all(self, key: str, inners: set[str], value: int) -> None:
        self.nest.put_all(key, dict.fromkeys(inners, value))
        self.nested |= {(key, inner): value for inner in inners}

    @rule(key=_keys)
    def drop_all(self, key: str) -> None:
        self.nest.drop_all(key)
        self.nested = {pair: value for pair, value in self.nested.items() if pair[0] != key}

    @rule()
    def freeze(self) -> None:
        self.frozen.append((self.table.freeze(), self.nest.freeze(), self.flat.copy(), self.nested.copy()))

    @rule(key=_keys, inner=_keys)
    def compare(self, key: str, inner: str) -> None:
        assert self.table.get(key) == self.flat.get(key)
        assert (key in self.table) == (key in self.flat)
        assert self.nest.get(key, inner) == self.nested.get((key, inner))
        assert dict(self.nest.rows(key)) == {b: v for (a, b), v in self.nested.items() if a == key}
        assert dict(self.table.items()) == self.flat
        assert (len(self.table), len(self.nest)) == (len(self.flat), len(self.nested))
        for table, nest, flat, nested in self.frozen:
            assert {k: v for shard in table for k, v in shard.items()} == flat  # type: ignore[attr-defined]
            assert {
                (a, b): v
                for shard in nest  # type: ignore[attr-defined]
                for a, rows in shard.items()
                for b, v in rows.items()
            } == nested


TestTablesAgainstDicts = TablesAgainstDicts.TestCase
TestTablesAgainstDicts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
