"""Each finding of raft.md that one node can show alone, put right: said to a real node, message by message.

What takes several nodes, or power losses at every step, is the simulation's (`tests/simulation/`).
"""

import pytest

from chaos_tests.simulation.replica import encode_command
from cluster.consensus import Applied, ConsensusStartError, Refusal, Rejected, Unknown
from cluster.raft.entries import Configuration, encode_configuration
from cluster.raft.messages import (
    Ack,
    AppendEntries,
    Probe,
    ProbeAck,
    Removed,
    RequestPreVote,
    RequestVote,
    SnapshotChunk,
    TimeoutNow,
    Vote,
)
from tests.cluster.raft.lone_node import LoneNode, entry, info

PUT = encode_command(("put", "request", "key", "value"))


def test_1_a_snapshot_chunk_moves_no_commit_index() -> None:
    node = LoneNode()
    node.append([entry(2, 1), entry(3, 1)])
    config = b"\x93\x90\x90\x90"
    node.hear("n3", SnapshotChunk(2, 50, 2, config, 1000, b"d" * 32, 0, b"x" * 100, 50, 1.0))
    node.pass_seconds()
    assert node.core.guard.commit_index == 1
    assert node.applied == []


def test_4_an_acknowledgement_waits_for_its_own_sync() -> None:
    node = LoneNode()
    node.append([entry(2, 1)])
    assert not [ack for ack in node.of(Ack) if ack.success]
    node.pass_seconds()
    assert [ack.next_index for ack in node.of(Ack) if ack.success] == [3]


def test_4_a_heartbeat_is_answered_without_the_disk() -> None:
    node = LoneNode()
    node.append([entry(2, 1)])
    node.append([], previous=(2, 1))
    assert [(ack.success, ack.reset) for ack in node.of(Ack)] == [(False, False)]


def test_4_a_leader_counts_itself_only_once_synced() -> None:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    node.syncer.slow_until = node.clock.now + 10
    committed = node.core.guard.commit_index
    node.propose(PUT)
    node.pass_seconds(0.01)
    node.acknowledge("n2", node.core.guard.last_index)
    assert node.core.guard.commit_index == committed
    node.pass_seconds(0.5)
    assert node.core.guard.commit_index == committed + 1


def test_4_a_vote_waits_for_its_sync() -> None:
    node = LoneNode()
    node.hear("n2", RequestVote(1, 1, 0))
    assert node.of(Vote) == []
    node.pass_seconds()
    assert node.of(Vote) == [Vote(1)]


def test_5_a_late_message_cuts_off_nothing_that_agrees() -> None:
    node = LoneNode()
    entries = [entry(index, 1) for index in range(2, 12)]
    node.append(entries, commit=8)
    node.pass_seconds()
    node.append(entries[:3], commit=8)
    node.pass_seconds()
    assert node.core.guard.last_index == 11
    assert [ack.next_index for ack in node.of(Ack) if ack.success] == [12, 5]


def test_5_a_real_conflict_gives_way() -> None:
    node = LoneNode()
    node.append([entry(index, 1) for index in range(2, 8)], commit=4)
    node.append([entry(5, 2, "other")], term=2, previous=(4, 1), commit=5, sender="n3")
    node.pass_seconds()
    assert (node.core.guard.last_index, node.core.guard.last_term, node.core.guard.commit_index) == (5, 2, 5)


def test_5_a_contradiction_of_what_is_committed_ends_the_node() -> None:
    node = LoneNode()
    node.append([entry(index, 1) for index in range(2, 8)], commit=6)
    node.append([entry(5, 2, "other")], term=2, previous=(4, 1), sender="n3")
    node.pass_seconds()
    assert "contradicts" in node.fatal[0]


@pytest.mark.parametrize("what", ["missing", "damaged", "damaged while it runs"])
def test_6_9_a_log_without_the_snapshot_before_it_starts_nobody(what: str) -> None:
    node = LoneNode(segment_bytes=1_000, log_bytes_before_snapshot=3_000, keep_tail_bytes=0)
    node.lead()
    for number in range(60):
        node.propose(encode_command(("put", f"r{number}", f"key {number}", "value" * 10)))
        node.pass_seconds(0.02)
        node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    assert node.core.guard.first_index > 1
    (name,) = [name for name in node.disk.list() if name.startswith("snapshot")]
    if what == "missing":
        node.disk.remove(name)
        node.disk.sync_folder()
        with pytest.raises(
            ConsensusStartError, match=r"snapshot of what came before is missing.*as a new node"
        ):
            node.power_cycle()
        return
    node.disk.names[name].seen[400] ^= 1
    node.disk.names[name].kept = bytes(node.disk.names[name].seen)
    if what == "damaged":
        with pytest.raises(ConsensusStartError, match=r"snapshot is damaged.*add it again as a new node"):
            node.power_cycle()
        return
    node.sent.clear()
    node.hear("n3", Ack(node.core.guard.term, 2, False, True, node.runtime.now()))  # it needs the snapshot
    node.pass_seconds()
    assert len(node.fatal) == 1 and "snapshot is damaged" in node.fatal[0]
    assert node.of(SnapshotChunk) == []


def test_8_an_acknowledgement_of_another_term_counts_for_nothing() -> None:
    node = LoneNode(5)
    term = node.lead()
    last = node.core.guard.last_index
    for number in (2, 3, 4):
        node.acknowledge(f"n{number}", last, term - 1)
    node.pass_seconds()
    assert node.core.guard.commit_index < last
    node.acknowledge("n2", last)
    node.acknowledge("n3", last)
    assert node.core.guard.commit_index == last


def test_8_a_higher_term_in_an_answer_deposes() -> None:
    node = LoneNode()
    term = node.lead()
    node.acknowledge("n2", 1, term + 3)
    assert not node.core.guard.leading
    assert node.core.guard.term == term + 3


def test_8_a_deposed_leader_is_told_the_term() -> None:
    node = LoneNode()
    node.append([], term=4)
    node.append([], term=2, sender="n3")
    assert node.sent[-1][0] == "n3"
    assert node.sent[-1][1].term == 4  # type: ignore[union-attr]


def test_11_a_vote_survives_a_power_loss() -> None:
    node = LoneNode()
    node.hear("n2", RequestVote(7, 9, 3))
    node.pass_seconds()
    assert node.of(Vote) == [Vote(7)]
    node.power_cycle()
    node.sent.clear()
    node.hear("n3", RequestVote(7, 9, 3))
    node.pass_seconds()
    assert node.of(Vote) == []


def test_11_a_vanished_folder_may_not_begin_anew() -> None:
    node = LoneNode()
    node.append([entry(2, 1)])
    node.pass_seconds()
    node.disk.vanish()
    with pytest.raises(ConsensusStartError, match="add it again as a new node"):
        node.power_cycle()


def test_12_what_raises_ends_the_node_and_wedges_nobody() -> None:
    node = LoneNode(1)
    node.lead()
    node.replica.apply = lambda commands: 1 / 0  # type: ignore[assignment,method-assign,return-value]
    ends = node.propose(PUT)
    node.pass_seconds(1.0)
    assert "could not be applied" in node.fatal[0]
    assert isinstance(ends[0], Unknown)


def test_13_a_barrier_needs_answers_to_its_own_round() -> None:
    node = LoneNode()
    term = node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    done: list[bool] = []
    node.core.barrier(node.runtime.now() + 1, done.append)
    node.pass_seconds(0.01)
    probe = node.of(Probe)[-1]
    node.hear("n2", ProbeAck(term, probe.round - 1, probe.sent_at))
    assert done == []
    node.hear("n2", ProbeAck(term, probe.round, probe.sent_at))
    assert done == [True]


def test_13_a_leader_cut_off_fails_its_readers_within_its_fallback() -> None:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    done: list[bool] = []
    node.core.barrier(node.runtime.now() + 60, done.append)
    node.pass_seconds(1.5)
    assert done == [False]
    assert not node.core.guard.leading


def test_15_every_caller_is_answered_before_its_deadline() -> None:
    node = LoneNode()
    left_behind = node.propose(PUT, 0.3)
    node.pass_seconds(0.4)
    assert isinstance(left_behind[0], Rejected)
    assert left_behind[0].refusal is Refusal.NO_LEADER
    node.lead()
    under_way = node.propose(PUT, 0.3)
    node.pass_seconds(0.4)
    assert isinstance(under_way[0], Unknown)


def test_16_the_repair_hint_is_the_entry_after_the_committed_one() -> None:
    node = LoneNode()
    node.append([entry(index, 1) for index in range(2, 8)], commit=4)
    node.sent.clear()
    node.append([], previous=(40, 3), term=3)
    node.append([], previous=(6, 3), term=3)
    assert [(ack.reset, ack.next_index) for ack in node.of(Ack)] == [(True, 5), (True, 5)]


def test_18_the_engine_has_no_method_to_call_by_number() -> None:
    assert LoneNode().core.guard._methodToID == {}


def test_19_a_full_disk_refuses_keeps_and_recovers() -> None:
    node = LoneNode(1)
    node.lead()
    kept = node.propose(PUT)
    node.pass_seconds()
    node.disk.room_bytes = node.disk.used_bytes()
    first = node.propose(encode_command(("put", "a", "k", "v")), 3.0)
    node.pass_seconds(0.5)
    refused = node.propose(encode_command(("put", "b", "k", "v")))
    node.pass_seconds(0.1)
    assert node.core.status().disk_full
    assert isinstance(refused[0], Rejected)
    assert refused[0].refusal is Refusal.DISK_FULL
    node.disk.room_bytes = None
    node.pass_seconds(2.0)
    again = node.propose(encode_command(("put", "c", "k", "v")))
    node.pass_seconds(2.0)
    assert isinstance(kept[0], Applied)
    assert isinstance(again[0], Applied)
    assert first
    assert node.fatal == []


def test_19_a_leader_whose_followers_have_no_room_says_so_at_once() -> None:
    node = LoneNode()
    term = node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    begun = node.propose(PUT)
    node.pass_seconds(0.05)
    for full in (True, False):
        for name in ("n2", "n3"):
            node.hear(name, Ack(term, 0, False, False, node.runtime.now(), disk_full=full))
        last = node.core.guard.last_index
        ends = node.propose(encode_command(("put", f"full {full}", "k", "v")))
        node.pass_seconds(0.1)
        assert (node.core.guard.last_index == last) == full, "what can be nowhere but here is not begun"
        if full:
            assert isinstance(ends[0], Rejected)
            assert ends[0].refusal is Refusal.DISK_FULL
            assert begun == [], "what was begun may still be agreed on"
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    assert isinstance(begun[0], Applied)
    assert isinstance(ends[0], Applied)
    node.hear("n2", Ack(term, 0, False, False, node.runtime.now(), disk_full=True))
    one_full = node.propose(encode_command(("put", "one full", "k", "v")))
    node.pass_seconds(0.05)
    node.acknowledge("n3", node.core.guard.last_index)
    node.pass_seconds()
    assert isinstance(one_full[0], Applied)


def test_19_a_leader_without_room_lets_another_stand_at_once() -> None:
    node = LoneNode()
    term = node.lead()
    node.acknowledge("n3", node.core.guard.last_index)
    node.disk.room_bytes = node.disk.used_bytes()
    node.propose(PUT)
    node.pass_seconds(0.2)
    assert [(to, message) for to, message in node.sent if isinstance(message, TimeoutNow)] == [
        ("n3", TimeoutNow(term))
    ]


def test_20_a_node_asks_before_it_raises_its_term() -> None:
    node = LoneNode()
    node.pass_seconds(5.0)
    assert node.core.guard.term == 0
    assert node.of(RequestPreVote)
    assert node.of(RequestVote) == []


def test_20_no_pre_vote_for_another_while_the_leader_is_heard() -> None:
    node = LoneNode()
    node.append([])
    node.hear("n3", RequestPreVote(2, 100, 1, 1))
    assert not node.sent[-1][1].granted  # type: ignore[union-attr]
    node.core.on_disconnected("n2")
    node.hear("n3", RequestPreVote(2, 100, 1, 2))
    assert node.sent[-1][1].granted  # type: ignore[union-attr]


def test_21_an_entry_is_applied_once_whatever_a_caller_does_with_its_answer() -> None:
    node = LoneNode(1)
    node.lead()

    def gone(_: object) -> None:
        raise RuntimeError("the caller is gone")

    node.core.submit(encode_command(("bump", "", "k", "")), node.runtime.now() + 2, gone)
    others = node.propose(PUT)
    node.pass_seconds()
    assert node.applied == [1, 2]
    assert isinstance(others[0], Applied)


def test_22_a_change_is_in_force_from_the_log_and_survives_a_restart() -> None:
    node = LoneNode()
    changed = Configuration((info(1), info(2), info(3)), (info(4),))
    node.append([(encode_configuration(changed), 2, 1)])
    assert node.core.membership.current == changed
    node.pass_seconds()
    node.power_cycle()
    assert node.core.membership.current == changed
    node.append([entry(2, 2)], term=2, sender="n3")
    assert node.core.membership.current == Configuration((info(1), info(2), info(3)))


def test_22_one_change_at_a_time_and_a_learner_first() -> None:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    ends: list[tuple[str, str]] = []
    due = node.runtime.now() + 5
    node.core.membership.add(info(4), due, lambda *end: ends.append(end))
    node.core.membership.add(info(5), due, lambda *end: ends.append(end))
    assert [outcome for outcome, _ in ends] == ["refused"]
    assert [learner.node_id for learner in node.core.membership.current.learners] == ["n4"]
    assert "n4" not in node.core.membership.current.voter_ids()


def test_22_a_removed_node_stops_when_a_member_says_so() -> None:
    node = LoneNode()
    node.hear("n9", Removed(5))  # a stranger's word is none
    node.pass_seconds()
    assert node.fatal == []
    node.hear("n2", Removed(5))
    node.pass_seconds()
    assert "removed from the cluster" in node.fatal[0]


def test_the_next_term_in_the_log_proves_that_a_proposal_never_happened() -> None:
    node = LoneNode()
    node.lead()
    ends = node.propose(PUT, 5.0)
    node.pass_seconds(0.05)
    term = node.core.guard.term
    node.append([(b"\x01", 2, term + 1)], term=term + 1, commit=2, sender="n3")
    node.pass_seconds(0.1)
    assert ends == []  # neither lost nor unknown: on its way to the new leader
    forwards = [m for to, m in node.sent if to == "n3" and type(m).__name__ == "Forward"]
    assert [forward.commands for forward in forwards] == [[PUT]]


def test_a_leader_sends_what_it_has_before_its_own_sync() -> None:
    node = LoneNode()
    node.lead()
    node.acknowledge("n2", node.core.guard.last_index)
    node.pass_seconds()
    node.syncer.slow_until = node.clock.now + 10
    node.sent.clear()
    node.propose(PUT)
    node.pass_seconds(0.001)
    assert [len(m.entries) for _, m in node.sent if isinstance(m, AppendEntries) and m.entries] == [1, 1]
