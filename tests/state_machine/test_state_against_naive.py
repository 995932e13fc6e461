"""The machine against a model that is obviously right, over all commands."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from state_naive import NaiveModel
from state_worlds import COMMANDS, HISTORY, SESSIONS, USERS, copy_of, derived, digest_of, run, view

from state_machine import commands as c
from state_machine import limits, queries
from state_machine.events import Change
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied
from state_machine.snapshot import FrozenMachine

SMALL = {
    "VERSIONS_PER_FILE_MAX": 1,
    "GROUP_LOG_ENTRIES_MAX": 6,
    "PEERS_PER_USER_MAX": 2,
    "JOIN_REQUESTS_PER_GROUP_MAX": 2,
    "FILES_PER_GROUP_MAX": 2,
    "SEEDERS_PER_SWARM_MAX": 3,
}


class MachineAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.usual = {name: getattr(limits, name) for name in SMALL}
        for name, value in SMALL.items():
            setattr(limits, name, value)
        self.changes: list[Change] = []
        self.machine = StateMachine(self.changes.append)
        self.model = NaiveModel()
        self.held: list[tuple[FrozenMachine, bytes]] = []

    def teardown(self) -> None:
        for name, value in self.usual.items():
            setattr(limits, name, value)

    @initialize(populated=st.sampled_from([True, True, True, False]))
    def begin(self, populated: bool) -> None:
        for command in HISTORY if populated else ():
            self.both(command)

    def both(self, command: c.AnyCommand) -> None:
        before, seen = self.model.revision, len(self.changes)
        if isinstance(command, c.AnnouncePeers) and len(command.announcements) == 1:
            value, effect = queries.announcement_effect(self.machine.state, command.announcements[0])
        outcome = run(self.machine, command)
        code = self.model.apply(command)
        assert code == ("" if isinstance(outcome, Applied) else outcome.code), (command, outcome)
        assert outcome.revision == self.model.revision, (command, outcome)
        changed = self.model.revision > before
        if isinstance(command, c.AnnouncePeers) and len(command.announcements) == 1:
            assert (outcome.value, changed) == ((value,), effect), "the forecast was right"
        assert [change.revision for change in self.changes[seen:]] == [self.model.revision] * changed

    @rule(commands=st.lists(COMMANDS, min_size=1, max_size=6))
    def apply(self, commands: list[c.AnyCommand]) -> None:
        for command in commands:
            self.both(command)

    @rule(data=st.data())
    def expire_a_living_peer(self, data: st.DataObject) -> None:
        living = [(p, row.counter) for p, row in self.model.peers.items() if row.counter is not None]
        if living:
            self.both(c.ExpirePeers((data.draw(st.sampled_from(living)),)))

    @rule(data=st.data(), fault=st.sampled_from(["bad_piece", "unreachable"]))
    def report_a_holder(self, data: st.DataObject, fault: Any) -> None:
        if self.model.holdings:
            h = data.draw(st.sampled_from(self.model.holdings))
            for member in list(self.model.groups[h.group].members)[:3]:
                self.both(c.ReportPeer(h.group, h.name, h.manifest, h.peer, fault, member.user, 1))

    @precondition(lambda self: self.model.groups)
    @rule(
        data=st.data(),
        kind=st.sampled_from([c.PromoteMember, c.PromoteMember, c.DemoteMember, c.TransferGroup]),
    )
    def owner_changes_a_role(self, data: st.DataObject, kind: Any) -> None:
        group = data.draw(st.sampled_from(sorted(self.model.groups)))
        members = [m.user for m in self.model.groups[group].members]
        owner = next(m.user for m in self.model.groups[group].members if m.role == "owner")
        self.both(kind(group, data.draw(st.sampled_from(members)), owner, data.draw(st.integers(0, 99))))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data())
    def owner_leaves(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.model.groups)))
        owner = next(m.user for m in self.model.groups[group].members if m.role == "owner")
        self.both(c.LeaveGroup(group, owner, 1, data.draw(st.integers(0, 99))))

    @precondition(lambda self: self.model.groups)
    @rule(data=st.data(), user=st.sampled_from(USERS))
    def someone_joins(self, data: st.DataObject, user: str) -> None:
        group = data.draw(st.sampled_from(sorted(self.model.groups)))
        owner = next(m.user for m in self.model.groups[group].members if m.role == "owner")
        self.both(c.RequestJoin(group, user, 1))
        self.both(c.AcceptRequest(group, user, owner, 2))

    @precondition(lambda self: self.model.holdings)
    @rule(data=st.data(), again=st.booleans(), whole=st.booleans())
    def announce_again(self, data: st.DataObject, again: bool, whole: bool) -> None:
        """What a peer that changed nothing says: all it holds, or nothing new."""
        peer = data.draw(st.sampled_from(self.model.holdings)).peer
        facts = tuple(
            c.Fact(h.group, h.name, h.manifest, h.pieces, h.complete)
            for h in self.model.holdings
            if h.peer == peer and (again or whole)
        )
        user = self.model.peers[peer].user
        self.both(c.AnnouncePeers((c.Announcement(peer, user, (), facts, whole),), 1))

    @precondition(lambda self: self.model.peers and any(g.files for g in self.model.groups.values()))
    @rule(data=st.data(), pieces=st.integers(0, 1), complete=st.booleans())
    def member_joins_a_swarm(self, data: st.DataObject, pieces: int, complete: bool) -> None:
        group = data.draw(st.sampled_from([g for g, row in self.model.groups.items() if row.files]))
        name = data.draw(st.sampled_from(sorted(self.model.groups[group].files)))
        manifest = data.draw(st.sampled_from(sorted(self.model.versions(group, name))))
        peer, row = data.draw(st.sampled_from(sorted(self.model.peers.items(), key=lambda item: item[0])))
        fact = c.Fact(group, name, manifest, pieces, complete)
        self.both(c.AnnouncePeers((c.Announcement(peer, row.user, (), (fact,)),), 1))

    @rule()
    def freeze(self) -> None:
        if len(self.held) < 2:
            self.held.append((self.machine.freeze(), self.machine.digest()))

    @precondition(lambda self: self.held)
    @rule()
    def encode_what_was_frozen(self) -> None:
        frozen, digest = self.held.pop(0)
        assert digest_of(frozen) == digest, "writing after the freeze must not show in it"

    @rule()
    def go_on_from_a_snapshot(self) -> None:
        loaded = copy_of(self.machine)
        assert loaded.digest() == self.machine.digest()
        assert derived(loaded.state) == derived(self.machine.state)
        self.machine.state = loaded.state

    @invariant()
    def same_view(self) -> None:
        assert view(self.machine) == self.model.view(SESSIONS)


TestMachineAgainstModel = MachineAgainstModel.TestCase
TestMachineAgainstModel.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
