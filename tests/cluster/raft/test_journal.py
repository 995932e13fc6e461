"""The journal against a naive model, with crashes at every step of the disk, and damage of every kind."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fake_disk import Crash, FakeDisk, FakeRuntime
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.consensus import ConsensusStartError
from cluster.raft.disk import DiskFullError
from cluster.raft.journal import Journal
from cluster.raft.journal_format import Identity, encode_entry, segment_name

IDENTITY = Identity("n1", "c1")
State = tuple[tuple[tuple[bytes, int, int], ...], int, str | None]


class Harness:
    """A journal on a fake disk and the list of every state it ever had, by position."""

    def __init__(self, disk: FakeDisk, *, create: bool, segment_bytes: int = 300, seed: int = 0) -> None:
        self.disk = disk
        self.runtime = FakeRuntime(seed)
        self.fatal: list[str] = []
        self.full: list[bool] = []
        self.journal = Journal.open(
            disk,
            self.runtime,
            identity=IDENTITY,
            create=create,
            segment_bytes=segment_bytes,
            on_fatal=self.fatal.append,
            on_disk_full=self.full.append,
        )
        self.states: dict[int, State] = {}
        self.full_log = list(self.journal[:])  # as if nothing were ever compacted
        self.compacted = self.journal.first_index
        self.committed: dict[int, tuple[bytes, int, int]] = {}
        self.note()

    def note(self) -> None:
        journal = self.journal
        term, vote = journal.getCurrentTerm(), journal.getVotedForNodeId()
        self.states[journal.written] = (tuple(self.full_log), term, vote)

    def add(self, *commands: bytes) -> None:
        for command in commands:
            index = self.journal.next_index or 1
            self.journal.add(command, index, self.journal.getCurrentTerm())
            self.full_log.append((command, index, self.journal.getCurrentTerm()))
            self.note()

    def vote(self, term: int, name: str | None) -> None:
        self.journal.setCurrentTerm(term, name)
        self.note()

    def cut(self, places: int) -> None:
        places = min(places, len(self.journal) - 1)
        if places > 0:
            self.journal.deleteEntriesFrom(len(self.journal) - places)
            del self.full_log[-places:]
            self.note()

    def settle(self) -> None:
        self.journal.flush()
        self.runtime.syncer.drain()

    def act(self, action: tuple[str, int], rng: random.Random) -> None:
        kind, number = action
        journal = self.journal
        match kind:
            case "add":
                self.add(*(rng.randbytes(rng.choice([0, 1, 7, 40])) for _ in range(number % 5)))
            case "cut":
                self.cut(min(number % 7, journal.last_index - max(self.committed, default=0)))
            case "vote":
                self.vote(journal.getCurrentTerm() + number % 3, rng.choice([None, "n1", "n2"]))
            case "flush":
                journal.flush()
            case "sync":
                self.runtime.syncer.step()
            case "second":
                journal.onOneSecondTimer()
            case "commit":
                # On a leader, what others have synced is committed before it is synced here.
                index = number % (journal.last_index + 1)
                if index > max(self.committed, default=0):
                    journal.setRaftCommitIndex(index)
                    self.committed |= {entry[1]: entry for entry in self.full_log if entry[1] <= index}
            case "compact":
                if journal.synced_index > journal.first_index:
                    index = rng.randint(journal.first_index, journal.synced_index)
                    if rng.random() < 0.5:
                        journal.compact_to(index, number % 300)
                    else:
                        journal.deleteEntriesTo(index - journal.first_index)
                    self.compacted = max(self.compacted, index)
                    assert journal.first_index <= index
            case "reset":
                index, term = journal.last_index + number % 4, journal.getCurrentTerm()
                if index > max(self.committed, default=0) and journal.term_at(index) != term:
                    journal.reset_to(index, term)
                    self.full_log = [(b"", index, term)]
                    self.committed = {index: (b"", index, term)}
                    self.compacted = index
                    self.note()
                elif index and journal.term_at(index) == term:
                    journal.reset_to(index, term)
                    self.compacted = max(self.compacted, index)


def check_state(found: Journal, states: dict[int, State], at_least: int, compacted: int) -> None:
    """What was opened is one of the states there were, no older than what was synced."""
    assert found.written >= at_least
    log, term, vote = states[found.written]
    assert (found.getCurrentTerm(), found.getVotedForNodeId()) == (term, vote)
    entries = tuple(found[:])
    if log:
        assert entries == log[len(log) - len(entries) :]
        if log[-1][1] >= compacted:
            assert entries[0][1] <= max(compacted, log[0][1])
    else:
        assert not entries
    assert found.getRaftCommitIndex() <= max(1, found.next_index - 1)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["add"] * 5
            + ["cut", "vote", "flush", "flush", "sync", "sync", "sync", "second", "commit"]
            + ["compact", "reset"]
        ),
        st.integers(0, 1000),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS, st.integers(0, 150), st.integers(0, 2**32), st.booleans())
@example([("add", 4), ("flush", 0), ("sync", 0)], 9, 1, True)
def test_crash_at_any_step_keeps_what_was_synced(
    actions: list[tuple[str, int]], steps: int, seed: int, power: bool
) -> None:
    rng = random.Random(seed)
    disk = FakeDisk()
    harness = Harness(disk, create=True, seed=seed)
    for life in range(3):
        disk.steps_left = steps
        reported: set[int] = set()
        try:
            for action in actions:
                harness.act(action, rng)
                position = harness.journal.written
                harness.journal.when_synced(
                    position, lambda position=position, reported=reported: reported.add(position)
                )
                assert harness.journal.synced_index <= harness.journal.last_index
            harness.settle()
            if rng.random() < 0.5:
                harness.journal.close()
                harness.runtime.syncer.drain()
        except Crash:
            pass
        assert not harness.fatal
        synced = max([harness.journal.synced, *reported])
        disk = disk.crash(rng, power=power)
        while True:
            # A crash while it starts must not matter either.
            disk.steps_left = rng.randrange(12) if rng.random() < 0.5 else None
            try:
                following = Harness(disk, create=False, seed=seed + life + 1)
                break
            except Crash:
                disk = disk.crash(rng, power=power)
        check_state(following.journal, harness.states, synced, harness.compacted)
        hint = following.journal.getRaftCommitIndex()
        for entry in following.journal[:] if hint > 1 else []:
            if entry[1] in harness.committed and entry[1] <= hint:
                assert entry == harness.committed[entry[1]]
        known = {i: entry for i, entry in harness.committed.items() if i <= following.journal.last_index}
        hinted = {entry[1]: entry for entry in following.journal[:] if 1 < entry[1] <= hint}
        following.committed = known | hinted
        log = harness.states[following.journal.written][0]
        following.full_log = list(log)
        following.compacted = harness.compacted
        following.note()
        harness = following
    disk.steps_left = None
    harness.add(b"still works")
    harness.settle()
    assert harness.journal.synced == harness.journal.written


def filled(seed: int = 0, *, sealed: bool = True) -> Harness:
    harness = Harness(FakeDisk(), create=True, seed=seed)
    harness.vote(3, "n2")
    for number in range(12):
        harness.add(*(b"command %d %d" % (number, part) for part in range(number % 3 + 1)))
        if number == 6:
            harness.cut(2)
        harness.settle()
    harness.vote(5, None)
    harness.settle()
    if sealed:
        harness.journal.onOneSecondTimer()
        harness.settle()
    return harness


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_a_flipped_bit_is_never_served(data: st.DataObject) -> None:
    harness = filled()
    files = harness.disk.files()
    assert len(files) >= 4, "several segments and the head"
    name = data.draw(st.sampled_from(sorted(files)))
    bit = data.draw(st.integers(0, len(files[name]) * 8 - 1))
    damaged = bytearray(files[name])
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        journal = Harness(FakeDisk({**files, name: bytes(damaged)}), create=False).journal
    except ConsensusStartError as error:
        assert "journal" in str(error)
        return
    # Only the seal itself may be taken for a torn tail: nothing is lost with it.
    assert journal.written == harness.journal.written
    check_state(journal, harness.states, harness.journal.synced, 1)


def test_every_bit_of_the_last_segment() -> None:
    harness = filled(sealed=False)
    files = harness.disk.files()
    last = max(name for name in files if name.endswith(".log"))
    before_last_batch = harness.journal.written - 1
    for bit in range(len(files[last]) * 8):
        damaged = bytearray(files[last])
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            journal = Harness(FakeDisk({**files, last: bytes(damaged)}), create=False).journal
        except ConsensusStartError:
            continue
        # Without a seal, damage to the very last batch cannot be told from a torn one; never more than that.
        assert journal.written >= before_last_batch
        check_state(journal, harness.states, before_last_batch, 1)


@pytest.mark.parametrize("cut", range(0, 200, 3))
def test_a_torn_tail_is_dropped(cut: int) -> None:
    harness = Harness(FakeDisk(), create=True, segment_bytes=10_000)
    harness.add(b"synced")
    harness.settle()
    harness.add(*(b"torn %d" % number for number in range(6)))
    whole_before = len(harness.disk.names[segment_name(1)].content)
    harness.settle()
    files = harness.disk.files()
    content = files[segment_name(1)]
    kept = min(whole_before + cut, len(content))
    journal = Harness(FakeDisk({**files, segment_name(1): content[:kept]}), create=False).journal
    check_state(journal, harness.states, 1, 1)
    assert journal[0][0] == b"synced"
    assert journal.size_bytes + journal.dropped_bytes == kept


def refusal(files: dict[str, bytes], **options: Any) -> str:
    with pytest.raises(ConsensusStartError) as caught:
        Journal.open(FakeDisk(files), FakeRuntime(), **{"identity": IDENTITY, "on_fatal": print, **options})
    return str(caught.value)


def test_a_missing_segment_is_refused_by_name() -> None:
    files = filled().disk.files()
    segments = sorted(name for name in files if name.endswith(".log"))
    assert len(segments) >= 3
    for name in segments[1:]:
        message = refusal({other: content for other, content in files.items() if other != name})
        assert name in message
        assert "missing" in message
        assert "add it again as a new node" in message
    assert "missing" in refusal({"journal.head": files["journal.head"]})


def test_a_missing_or_foreign_head_is_refused() -> None:
    files = filled().disk.files()
    assert "journal.head is missing" in refusal({n: c for n, c in files.items() if n != "journal.head"})
    assert "damaged" in refusal({**files, "journal.head": b""})
    assert "damaged" in refusal({**files, "journal.head": b"something else altogether, long enough"})


def test_an_empty_folder_is_no_node() -> None:
    assert "has taken part before" in refusal({})
    assert not Journal.exists(FakeDisk())
    assert Journal.exists(filled().disk)


def test_a_second_create_is_refused() -> None:
    assert "already" in refusal(filled().disk.files(), create=True)


def test_another_nodes_journal_is_refused() -> None:
    files = filled().disk.files()
    message = refusal(files, identity=Identity("n2", "c1"))
    assert "'n1'" in message
    assert "'n2'" in message
    assert "cluster" in refusal(files, identity=Identity("n1", "c2"))


def test_a_newer_format_is_refused_and_kept() -> None:
    files = filled().disk.files()
    for name in (n for n in files if n.startswith("journal")):
        newer = bytearray(files[name])
        newer[8] = 9
        message = refusal({**files, name: bytes(newer)})
        assert "newer version" in message
        assert "format 9" in message


def test_a_command_that_looks_like_a_record_is_only_a_command() -> None:
    harness = Harness(FakeDisk(), create=True, segment_bytes=10_000)
    evil = harness.disk.files()[segment_name(1)] + encode_entry((b"evil", 1, 0), 0)[0]
    harness.add(evil, evil, b"last")
    harness.settle()
    files = harness.disk.files()
    content = files[segment_name(1)]
    for kept in range(len(content) - 1, len(content) - 2 * len(evil), -7):
        journal = Harness(FakeDisk({**files, segment_name(1): content[:kept]}), create=False).journal
        check_state(journal, harness.states, 0, 1)


def test_one_sync_for_many_and_the_next_gathers() -> None:
    harness = Harness(FakeDisk(), create=True, segment_bytes=100_000)
    before = harness.disk.syncs
    called: list[int] = []
    for number in range(50):
        harness.add(b"x")
        harness.journal.when_synced(harness.journal.written, lambda number=number: called.append(number))
        harness.journal.flush()
    assert not called
    assert harness.runtime.syncer.step()
    assert called == [0], "the first flush took what there was"
    assert harness.journal.synced_index == 1
    assert harness.runtime.syncer.step()
    assert called == list(range(50))
    assert harness.disk.syncs - before == 2
    assert harness.journal.synced == harness.journal.written


def test_a_synced_position_does_not_wait() -> None:
    harness = filled()
    called: list[bool] = []
    harness.journal.when_synced(harness.journal.synced, lambda: called.append(True))
    assert called == [True]


def test_cutting_takes_back_the_synced_index_even_under_way() -> None:
    harness = Harness(FakeDisk(), create=True, segment_bytes=100_000)
    harness.add(b"a", b"b", b"c", b"d")
    harness.journal.flush()
    harness.cut(2)
    harness.add(b"other")
    harness.runtime.syncer.step()
    assert harness.journal.synced_index == 2, "the entry at 3 is another one now, and not on the disk"
    harness.settle()
    assert harness.journal.synced_index == 3


def test_a_torn_batch_never_commits_what_it_was_to_replace() -> None:
    harness = Harness(FakeDisk(), create=True, segment_bytes=100_000)
    harness.add(b"common", b"stale", b"stale")
    harness.settle()
    before = len(harness.disk.files()[segment_name(1)])
    harness.vote(2, None)
    harness.cut(2)
    harness.add(b"chosen", b"chosen")
    harness.journal.setRaftCommitIndex(3)
    harness.settle()
    files = harness.disk.files()
    content = files[segment_name(1)]
    for kept in range(before, len(content)):
        journal = Harness(FakeDisk({**files, segment_name(1): content[:kept]}), create=False).journal
        committed = [entry[0] for entry in journal[:] if entry[1] <= journal.getRaftCommitIndex()]
        assert b"stale" not in committed


def test_a_failed_sync_ends_the_node_once_and_is_never_reported() -> None:
    harness = filled()
    synced = harness.journal.synced
    called: list[bool] = []
    harness.disk.fail_sync = True
    harness.add(b"lost")
    harness.journal.when_synced(harness.journal.written, lambda: called.append(True))
    harness.settle()
    harness.disk.fail_sync = False
    harness.add(b"more")
    harness.settle()
    harness.journal.onOneSecondTimer()
    harness.runtime.syncer.drain()
    assert len(harness.fatal) == 1
    assert "input/output error" in harness.fatal[0]
    assert harness.journal.synced == synced
    assert not called


def test_a_failed_write_ends_the_node() -> None:
    harness = filled()
    harness.disk.fail_write = True
    harness.add(b"lost")
    harness.settle()
    assert len(harness.fatal) == 1


@pytest.mark.parametrize("room", range(0, 700, 9))
def test_a_disk_full_at_any_byte_loses_nothing_and_recovers(room: int) -> None:
    harness = filled()
    synced = harness.journal.synced
    harness.disk.room_bytes = harness.disk.used() + room
    for number in range(30):
        if harness.journal.disk_full:
            break
        harness.add(b"command %d" % number)
        harness.settle()
    assert harness.full == [True]
    position = harness.journal.written
    with pytest.raises(DiskFullError):
        harness.add(b"refused")
    assert harness.journal.written == position
    harness.vote(9, "n3")  # cannot last yet, so it is not acknowledged, and nothing breaks
    harness.settle()
    harness.journal.onOneSecondTimer()
    harness.runtime.syncer.drain()
    assert harness.journal.disk_full
    assert harness.journal.synced < harness.journal.written
    # Killed now: what was synced is there.
    check_state(Harness(FakeDisk(harness.disk.files()), create=False).journal, harness.states, synced, 1)
    harness.disk.room_bytes = None
    harness.journal.onOneSecondTimer()
    harness.runtime.syncer.drain()
    assert harness.full == [True, False]
    assert harness.journal.synced == harness.journal.written
    harness.add(b"goes on")
    harness.settle()
    check_state(
        Harness(FakeDisk(harness.disk.files()), create=False).journal,
        harness.states,
        harness.journal.synced,
        1,
    )
    assert not harness.fatal


def test_compaction_makes_room_on_a_full_disk() -> None:
    harness = filled()
    harness.disk.room_bytes = harness.disk.used() + 20
    harness.add(b"does not fit, whatever is done to it")
    harness.settle()
    assert harness.journal.disk_full
    harness.journal.compact_to(harness.journal.synced_index)
    harness.runtime.syncer.drain()
    harness.journal.onOneSecondTimer()
    harness.runtime.syncer.drain()
    assert not harness.journal.disk_full


def test_compaction_drops_files_and_keeps_a_tail() -> None:
    harness = filled()
    files = len(harness.disk.names)
    harness.journal.compact_to(harness.journal.last_index, keep_tail_bytes=10**9)
    harness.runtime.syncer.drain()
    assert len(harness.disk.names) == files
    harness.journal.compact_to(harness.journal.last_index, keep_tail_bytes=300)
    harness.runtime.syncer.drain()
    assert len(harness.disk.names) < files
    assert 300 <= harness.journal.size_bytes < 900
    assert harness.journal[0][1] == harness.journal.first_index > 1
    reopened = Harness(FakeDisk(harness.disk.files()), create=False).journal
    assert reopened[:] == harness.journal[:]


def test_segments_go_oldest_first_whatever_made_them_go() -> None:
    harness = filled()
    removed: list[str] = []
    remove = harness.disk.remove

    def noting(name: str) -> None:
        removed.append(name)
        remove(name)

    harness.disk.remove = noting  # type: ignore[method-assign]
    harness.journal.reset_to(1000, 5)  # lets all segments go, once it is synced
    harness.journal.compact_to(harness.journal.last_index)  # lets some of them go now
    harness.settle()
    assert len(removed) >= 3
    assert removed == sorted(removed)


def test_a_reset_that_the_log_matches_keeps_what_follows() -> None:
    harness = filled()
    index = harness.journal.first_index + 3
    tail = harness.journal[3:]
    term = harness.journal.term_at(index)
    assert term is not None
    harness.journal.reset_to(index, term)
    harness.settle()
    assert harness.journal[:] == tail


def test_a_reset_beyond_the_log_leaves_one_anchor() -> None:
    harness = filled()
    harness.journal.reset_to(1000, 5)
    harness.add(b"next")
    harness.settle()
    assert harness.journal[:] == [(b"", 1000, 5), (b"next", 1001, 5)]
    assert harness.journal.synced_index == 1001
    assert sum(name.endswith(".log") for name in harness.disk.names) <= 2
    reopened = Harness(FakeDisk(harness.disk.files()), create=False).journal
    assert reopened[:] == harness.journal[:]
    assert reopened.getCurrentTerm() == 5


def test_clear_forgets_everything() -> None:
    harness = filled()
    harness.journal.clear()
    harness.journal.add(b"anchor", 77, 2)
    harness.settle()
    assert harness.journal[:] == [(b"anchor", 77, 2)]
    assert Harness(FakeDisk(harness.disk.files()), create=False).journal[:] == [(b"anchor", 77, 2)]


def test_the_impossible_is_an_assertion() -> None:
    journal = filled().journal
    with pytest.raises(AssertionError):
        journal.add(b"", journal.last_index + 2, 5)
    with pytest.raises(AssertionError):
        journal.add(b"", journal.last_index + 1, 6)
    with pytest.raises(AssertionError):
        journal.setCurrentTerm(4, None)


def test_closing_writes_what_is_left() -> None:
    for under_way in (False, True):
        harness = filled()
        harness.add(b"one")
        if under_way:
            harness.journal.flush()
            harness.add(b"two")
        harness.journal.close()
        harness.journal.close()
        harness.runtime.syncer.drain()
        found = Harness(FakeDisk(harness.disk.files()), create=False).journal
        assert found[:] == harness.journal[:]
