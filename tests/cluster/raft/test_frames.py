"""Frames: whole messages from streams cut anywhere, nothing but messages from anything else, and no pickle."""

from __future__ import annotations

import ast
import pickle
import random
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster
from cluster.raft import frames
from cluster.raft.frames import FrameError, FrameReader, Hello, decode_greeting, decode_message, encode
from cluster.raft.messages import Ack, AppendEntries, Message, Probe, Vote

MESSAGES = st.one_of(
    st.builds(
        AppendEntries,
        term=st.integers(0, 2**63),
        commit_index=st.integers(0, 2**63),
        previous_index=st.integers(0, 9),
        previous_term=st.integers(0, 9),
        entries=st.lists(
            st.tuples(st.binary(max_size=300), st.integers(0, 99), st.integers(0, 99)), max_size=5
        ),
        sent_at=st.floats(allow_nan=False),
        quorum_age_seconds=st.floats(allow_nan=False),
    ),
    st.builds(
        Ack, st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans(), st.just(1.5), st.booleans()
    ),
    st.builds(Vote, st.integers(0, 9)),
    st.builds(Probe, st.integers(0, 9), st.integers(0, 9), st.just(0.25)),
)


@given(st.lists(MESSAGES, max_size=8), st.lists(st.integers(1, 200), max_size=40))
@settings(deadline=None)
def test_what_is_sent_is_read_however_it_is_cut(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in messages)
    reader = FrameReader(frames.FRAME_BYTES_MAX)
    found: list[Message] = []
    for cut in [*cuts, len(stream)]:
        found += [decode_message(body) for body in reader.feed(stream[:cut])]
        stream = stream[cut:]
    assert found == messages


@given(st.binary(max_size=400))
def test_garbage_is_an_error_or_not_yet_a_frame(data: bytes) -> None:
    reader = FrameReader(4096)
    try:
        for body in reader.feed(data):
            decode_message(body)
    except FrameError:
        pass


@given(st.binary(max_size=100))
def test_a_damaged_message_is_an_error_or_another_message(noise: bytes) -> None:
    for decode in (decode_message, decode_greeting):
        with pytest.raises(FrameError):
            decode(b"\xc1" + noise)  # the one byte that msgpack never uses


@pytest.mark.parametrize("length", [0, 4097, 2**30, 2**32 - 1])
def test_a_length_out_of_bounds_is_refused_before_it_is_kept(length: int) -> None:
    reader = FrameReader(4096)
    with pytest.raises(FrameError, match="4096 are allowed"):
        reader.feed(struct.pack(">I", length) + bytes(10))


def test_no_more_than_one_frame_is_kept() -> None:
    reader = FrameReader(4096)
    for _ in range(50):
        assert reader.feed(struct.pack(">I", 4096)) == []
        assert len(reader.feed(bytes(4095))) == 0
        assert len(reader.feed(bytes(1))) == 1
        assert len(reader._buffer) == 0


def test_only_exact_types() -> None:
    for wrong in (
        [2, "term", 1, True, False, 0.5],
        [2],
        [99, 1],
        {"term": 1},
        [4, 1.5],
        "x",
        [2, 1, 1, 1, 1, 1],
    ):
        with pytest.raises(FrameError):
            decode_message(msgspec.msgpack.encode(wrong))
    with pytest.raises(FrameError):
        decode_message(pickle.dumps(Vote(1)))
    with pytest.raises(FrameError):
        decode_greeting(encode(Vote(1))[4:])
    with pytest.raises(FrameError):
        decode_message(encode(Hello(1, "c", "n1", "n2", 1, []))[4:])


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(FrameError):
        decode_message(b"\x91" * 100_000)


def test_a_frame_beyond_the_bound_is_a_defect_of_the_sender() -> None:
    entry = (random.Random(1).randbytes(frames.FRAME_BYTES_MAX), 1, 1)
    with pytest.raises(AssertionError, match="AppendEntries"):
        encode(AppendEntries(1, 1, 1, 1, [entry], 0.0, 0.0))


def test_nothing_in_the_cluster_package_can_unpickle() -> None:
    forbidden = {"pickle", "cPickle", "dill", "marshal", "shelve", "pysyncobj.transport.TCPTransport"}
    forbidden |= {
        f"pysyncobj.{module}" for module in ("pickle", "serializer", "tcp_connection", "tcp_server")
    }
    assert cluster.__file__ is not None
    sources = sorted(Path(cluster.__file__).parent.rglob("*.py"))
    assert len(sources) > 15
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            assert not names & forbidden, f"{source} imports {names & forbidden}"
