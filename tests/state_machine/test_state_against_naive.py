"""The machine against a model that is obviously right, over all commands."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from state_naive import NaiveModel
from state_worlds import COMMANDS, HISTORY, SESSIONS, copy_of, derived, digest_of, run, view

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

    @rule(command=COMMANDS)
    def apply(self, command: c.AnyCommand) -> None:
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
TestMachineAgainstModel.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
