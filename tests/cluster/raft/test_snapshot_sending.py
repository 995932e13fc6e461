"""Sending a snapshot to a node that loses, half-way, what it had of it."""

from chaos_tests.simulation.replica import encode_command
from cluster.raft.messages import Ack, SnapshotAck, SnapshotChunk
from tests.cluster.raft.lone_node import LoneNode


def leader_with_a_snapshot() -> LoneNode:
    node = LoneNode(
        segment_bytes=1_000,
        log_bytes_before_snapshot=3_000,
        keep_tail_bytes=1_000,
        snapshot_chunk_bytes=100,
        snapshot_chunks_in_flight=2,
    )
    node.lead()
    for number in range(200):
        node.propose(encode_command(("put", f"r{number}", f"key {number}", "value")))
        node.pass_seconds(0.01)
        node.acknowledge("n2", node.core.guard.last_index)
        if node.core.guard.first_index > 10:
            break
    assert node.core.guard.first_index > 10
    node.pass_seconds()
    return node


def chunks(node: LoneNode) -> list[SnapshotChunk]:
    """What was sent to n3 since last asked, which is then forgotten."""
    found = [message for to, message in node.sent if to == "n3" and isinstance(message, SnapshotChunk)]
    node.sent.clear()
    return found


def test_a_node_that_was_restarted_half_way_gets_it_from_the_beginning() -> None:
    node = leader_with_a_snapshot()
    term = node.core.guard.term
    node.sent.clear()
    node.hear("n3", Ack(term, 2, False, True, node.runtime.now()))  # it has nothing but the beginning
    first = chunks(node)
    assert [chunk.offset for chunk in first] == [0, 100]
    node.hear("n3", SnapshotAck(term, first[0].index, 200, False, first[1].sent_at))
    assert [chunk.offset for chunk in chunks(node)] == [200, 300]
    node.core.on_disconnected("n3")
    node.pass_seconds(0.01)
    node.core.on_connected("n3")
    tried = chunks(node)
    assert [chunk.offset for chunk in tried] == [200, 300]
    for chunk in tried:
        node.hear("n3", SnapshotAck(term, chunk.index, 0, False, chunk.sent_at))
    assert [chunk.offset for chunk in chunks(node)] == [0, 100]


def test_a_late_answer_does_not_make_it_begin_again() -> None:
    node = leader_with_a_snapshot()
    term = node.core.guard.term
    node.sent.clear()
    node.hear("n3", Ack(term, 2, False, True, node.runtime.now()))
    first = chunks(node)
    node.pass_seconds(0.01)
    node.hear("n3", SnapshotAck(term, first[0].index, 200, False, first[1].sent_at))
    chunks(node)
    node.hear("n3", SnapshotAck(term, first[0].index, 100, False, first[0].sent_at))
    assert chunks(node) == []


def test_a_node_that_begins_anew_again_and_again_does_not_keep_the_leader_from_a_newer_one() -> None:
    node = leader_with_a_snapshot()
    term, written = node.core.guard.term, node.core.snapshotting.written
    node.sent.clear()
    node.hear("n3", Ack(term, 2, False, True, node.runtime.now()))
    index = chunks(node)[0].index
    for number in range(60):
        node.pass_seconds(0.4)
        offset = 100 if number % 2 else 0
        node.hear("n3", SnapshotAck(term, index, offset, False, node.runtime.now()))
        node.propose(encode_command(("put", f"s{number}", f"other {number}", "v" * 100)))
        node.acknowledge("n2", node.core.guard.last_index)
    assert node.core.snapshotting.written > written


def test_what_is_left_of_a_snapshot_is_not_sent_from_the_newer_one_in_its_place() -> None:
    """The answer of a node that was given up comes late. Where the newer one was shorter, the leader looked for the rest
    of the old one for ever."""
    node = leader_with_a_snapshot()
    term, written = node.core.guard.term, node.core.snapshotting.written
    node.sent.clear()
    node.hear("n3", Ack(term, 2, False, True, node.runtime.now()))
    old = chunks(node)[0]
    for number in range(400):
        node.pass_seconds(0.1)
        node.propose(encode_command(("put", f"s{number}", f"other {number}", "v" * 100)))
        node.acknowledge("n2", node.core.guard.last_index)
        if node.core.snapshotting.written > written:
            break
    assert node.core.snapshotting.written > written
    node.sent.clear()
    node.hear("n3", SnapshotAck(term, old.index, 100, False, old.sent_at))
    sent = chunks(node)
    assert [chunk.offset for chunk in sent] == [0, 100]
    assert all(chunk.index > old.index and chunk.digest != old.digest for chunk in sent)
