"""Masks, counts and the picker against naive models."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.bitmap import (
    BitmapError,
    Counts,
    any_of,
    from_wire,
    full_mask,
    indices_of,
    mask_of,
    to_wire,
    without,
)
from peer.picker import Picker, Shares, rest


@given(st.sets(st.integers(0, 200)))
def test_masks_and_the_wire(indices: set[int]) -> None:
    mask = mask_of(indices)
    assert indices_of(mask) == sorted(indices)
    wire = to_wire(mask, 201)
    assert len(wire) == 26
    assert {i for i in range(201) if wire[i // 8] >> (7 - i % 8) & 1} == indices, "BEP 3's order of bits"
    assert from_wire(wire, 201) == mask


@pytest.mark.parametrize("wire", [b"", b"\0", b"\0\0\0", b"\0\x40"])
def test_a_bitmap_that_does_not_fit_is_refused(wire: bytes) -> None:
    with pytest.raises(BitmapError):
        from_wire(wire, 9)


def test_any_of_is_even() -> None:
    rng = random.Random(1)
    mask = mask_of([0, 1, 2, 50, 99])
    seen = Counter(any_of(mask, rng) for _ in range(5000))
    assert set(seen) == {0, 1, 2, 50, 99}
    assert all(800 < count < 1200 for count in seen.values())


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, (1 << 20) - 1)), max_size=30),
    st.integers(1, (1 << 20) - 1),
)
def test_counts_against_a_counter(steps: list[tuple[bool, int]], among: int) -> None:
    counts, naive = Counts(), Counter[int]()
    held: list[int] = []
    for add, mask in steps:
        if add or not held:
            counts.add(mask)
            held.append(mask)
            naive.update(indices_of(mask))
        else:
            gone = held.pop(mask % len(held))
            counts.remove(gone)
            naive.subtract(indices_of(gone))
    assert [counts.of(i) for i in range(20)] == [naive[i] for i in range(20)]
    assert counts.at_least_one() == mask_of(i for i in range(20) if naive[i])
    least = min(naive[i] for i in indices_of(among))
    assert counts.fewest(among) == (least, mask_of(i for i in indices_of(among) if naive[i] == least))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11)), max_size=80))
def test_the_picker_against_sets(steps: list[tuple[int, int]]) -> None:
    picker = Picker(12, 0b1, random.Random(3))
    have, asked = {0}, set[int]()
    for what, index in steps:
        match what:
            case 0 if index not in have:
                picker.asked(index)
                asked.add(index)
            case 1:
                picker.released(index)
                asked.discard(index)
            case 2:
                assert picker.gained(index) == (index not in have)
                have.add(index)
                asked.discard(index)
            case 3:
                assert picker.lost(1 << index) == ((1 << index) if index in have else 0)
                have.discard(index)
            case 4:
                picker.peer_has(1 << index)
        free = set(range(12)) - have - asked
        assert set(indices_of(picker.free)) == free
        assert (picker.missing, picker.free_count) == (12 - len(have), len(free))
        choice = picker.pick(full_mask(12))
        if free:
            assert choice in free
            assert picker.copies(choice) == min(picker.copies(i) for i in free)
        else:
            assert choice is None


@given(st.integers(0, 300), st.lists(st.text("abc", min_size=1), min_size=2, max_size=6, unique=True))
def test_shares_cover_every_piece_once_and_move_only_with_their_seeder(pieces: int, names: list[str]) -> None:
    seeders = sorted(names)
    shares = Shares(pieces)
    parts = {name: shares.of(name, seeders) for name in seeders}
    total = 0
    for part in parts.values():
        assert not total & part
        total |= part
    assert total == full_mask(pieces)
    if len(seeders) > 2:
        fewer = seeders[1:]
        assert all(without(parts[name], shares.of(name, fewer)) == 0 for name in fewer)
    assert rest(0b110, 0b011) == 0b010
    assert rest(0b100, 0b011) == 0b100
