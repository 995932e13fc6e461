"""Thousands of random commands that mostly make sense, against the naive model, from fixed seeds.

Hypothesis finds the short stories (`test_state_against_naive.py`); this one lives long: groups with
history, versions upon versions, peers that come and go. A failure names its seed and step.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from state_naive import NaiveModel
from state_worlds import (
    GROUPS,
    HASHES,
    HISTORY,
    KEYS,
    MANIFESTS,
    NAMES,
    PEERS,
    PIECES,
    SESSIONS,
    USERS,
    copy_of,
    derived,
    digest_of,
    run,
    view,
)

from state_machine import commands as c
from state_machine import limits, queries
from state_machine.machine import StateMachine
from state_machine.outcomes import Applied

SMALL = {
    "VERSIONS_PER_FILE_MAX": 2,
    "GROUP_LOG_ENTRIES_MAX": 6,
    "PEERS_PER_USER_MAX": 3,
    "JOIN_REQUESTS_PER_GROUP_MAX": 3,
    "FILES_PER_GROUP_MAX": 3,
    "SEEDERS_PER_SWARM_MAX": 4,
}
STEPS = 3_000


class Walker:
    """Draws the next command, looking at the model so that it has something to change."""

    def __init__(self, seed: int, model: NaiveModel) -> None:
        self.rng = random.Random(seed)
        self.model = model

    def group(self) -> str:
        return self.rng.choice(["g", "g", "g", "h"])

    def user(self, group: str, *roles: str) -> str:
        """Mostly a member of the group, of one of the roles if any are named."""
        row = self.model.groups.get(group)
        members = [m.user for m in row.members if not roles or m.role in roles] if row else []
        return self.rng.choice(members if members and self.rng.random() < 0.8 else USERS)

    def name(self, group: str) -> str:
        row = self.model.groups.get(group)
        files = sorted(row.files) if row else []
        return self.rng.choice(files if files and self.rng.random() < 0.8 else NAMES)

    def manifest(self, group: str, name: str) -> str:
        versions = sorted(self.model.versions(group, name))
        return self.rng.choice(versions if versions and self.rng.random() < 0.8 else MANIFESTS)

    def fact(self, group: str) -> c.Fact:
        name = self.name(group)
        rng = self.rng
        return c.Fact(
            group,
            name,
            self.manifest(group, name),
            rng.choice([0, 0, 1, 1, 2, 3, 9, -1]),
            rng.random() < 0.5,
            rng.random() < 0.15,
        )

    def announcement(self) -> c.Announcement:
        rng = self.rng
        peer = rng.choice(PEERS)
        row = self.model.peers.get(peer)
        user = row.user if row and rng.random() < 0.95 else rng.choice(USERS)
        if rng.random() < 0.2:  # says again what it holds
            facts = [
                c.Fact(h.group, h.name, h.manifest, h.pieces, h.complete)
                for h in self.model.holdings
                if h.peer == peer
            ]
        else:
            facts = [self.fact(self.group()) for _ in range(rng.randrange(4))]
        addresses = rng.choice([(), (), ("a:1",), ("a:1", "b:2")])
        return c.Announcement(peer, user, addresses, tuple(facts), rng.random() < 0.2, rng.random() < 0.03)

    def report(self) -> c.ReportPeer:
        rng = self.rng
        fault: Any = rng.choice(["bad_piece", "bad_piece", "unreachable", "stalled"])
        if not self.model.holdings or rng.random() < 0.1:
            return c.ReportPeer("g", "x", MANIFESTS[0], PEERS[0], fault, rng.choice(USERS), 1)
        h = rng.choice(self.model.holdings)
        return c.ReportPeer(h.group, h.name, h.manifest, h.peer, fault, self.user(h.group), 1)

    def waiting(self, group: str) -> str:
        row = self.model.groups.get(group)
        waiting = [r.user for r in row.requests] if row else []
        return self.rng.choice(waiting or USERS)

    def lift(self, at: int) -> c.LiftQuarantine:
        group, peer = self.rng.choice([*self.model.quarantine, ("g", self.rng.choice(PEERS))])
        return c.LiftQuarantine(group, peer, self.user(group, "owner", "admin"), at)

    def expiry(self) -> c.ExpirePeers:
        rng = self.rng
        peers = []
        for peer, row in self.model.peers.items():
            if rng.random() < 0.3:
                seen = row.counter if row.counter is not None and rng.random() < 0.4 else rng.randrange(999)
                peers.append((peer, seen))
        return c.ExpirePeers(tuple(peers))

    def publish(self, group: str, at: int) -> c.PublishFile:
        manifest, name = self.rng.choice(MANIFESTS), self.rng.choice(NAMES)
        return c.PublishFile(
            group, name, "file", 16384 * PIECES[manifest], PIECES[manifest], 16384, "sha256", manifest,
            self.rng.random() < 0.7, self.user(group), at, at + 10,
        )  # fmt: skip

    def command(self) -> c.AnyCommand:
        rng, group, at = self.rng, self.group(), self.rng.randrange(100)
        anyone, member = rng.choice(USERS), self.user(group)
        owner, admin = self.user(group, "owner"), self.user(group, "owner", "admin")
        name = self.name(group)
        policy: Any = rng.choice(["open", "open", "invitation"])
        # (how often, what)
        choices: list[tuple[float, Any]] = [
            (2, lambda: c.RegisterUser(anyone, "h", at, rng.choice(HASHES))),
            (2, lambda: c.ChangePassword(anyone, rng.choice(["h1", "h2"]), at)),
            (2, lambda: c.RevokeSession(anyone, rng.choice(SESSIONS), at)),
            (1, lambda: c.SetPolicy(policy)),
            (1, lambda: c.CreateInvitation(rng.choice(HASHES), at)),
            (2, lambda: c.CreateGroup(group, anyone, at)),
            (0.5, lambda: c.DeleteGroup(group, owner, at, at + 10)),
            (12, lambda: c.RequestJoin(group, anyone, at)),
            (2, lambda: c.WithdrawRequest(group, self.waiting(group), at)),
            (14, lambda: c.AcceptRequest(group, self.waiting(group), admin, at)),
            (3, lambda: c.RejectRequest(group, self.waiting(group), admin, at)),
            (1, lambda: c.LeaveGroup(group, member, at, at + 10)),
            (1, lambda: c.KickMember(group, member, admin, at, at + 10)),
            (5, lambda: c.PromoteMember(group, member, owner, at)),
            (3, lambda: c.DemoteMember(group, member, owner, at)),
            (2, lambda: c.TransferGroup(group, member, owner, at)),
            (12, lambda: self.publish(group, at)),
            (3, lambda: c.RemoveFile(group, name, member, at, at + 10)),
            (4, lambda: c.PutPeer(rng.choice(PEERS), anyone, at)),
            (30, lambda: c.AnnouncePeers(tuple(self.announcement() for _ in range(rng.randrange(1, 4))), at)),
            (3, lambda: c.RenewPeers(tuple(rng.sample(PEERS, 3)))),
            (2, self.expiry),
            (14, self.report),
            (3, lambda: self.lift(at)),
            (1, lambda: c.PutSigningKey(rng.choice(KEYS), rng.choice(["n1", "n2"]), b"k" * 32, at)),
            (1, lambda: c.RetireSigningKey(rng.choice(KEYS), at)),
            (1, lambda: c.Prune(rng.randrange(60))),
        ]
        weights = [weight for weight, _ in choices]
        command: c.AnyCommand = rng.choices(choices, weights)[0][1]()
        return command


@pytest.mark.parametrize("seed", range(4))
def test_a_long_walk(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in SMALL.items():
        monkeypatch.setattr(limits, limit, value)
    revisions: list[int] = []
    machine = StateMachine(lambda change: revisions.append(change.revision))
    model = NaiveModel()
    walker = Walker(seed, model)
    held = None
    applied: dict[str, int] = {}
    history = iter(HISTORY)
    for step in range(STEPS):
        command = next(history, None) or walker.command()
        where = (seed, step, command)
        before = model.revision
        outcome = run(machine, command)
        code = model.apply(command)
        assert code == ("" if isinstance(outcome, Applied) else outcome.code), (*where, outcome)
        assert outcome.revision == model.revision, (*where, outcome)
        assert view(machine) == model.view(SESSIONS), where
        if model.revision > before:
            assert revisions[-1] == model.revision, where
            applied[type(command).__name__] = applied.get(type(command).__name__, 0) + 1
        if step % 97 == 50:
            held = machine.freeze(), machine.digest()
        elif step % 97 == 90 and held is not None:
            assert digest_of(held[0]) == held[1], where
        elif step % 233 == 200:
            loaded = copy_of(machine)
            assert loaded.digest() == machine.digest(), where
            assert derived(loaded.state) == derived(machine.state), where
            machine.state = loaded.state
    assert set(GROUPS) >= {group.name for group in queries.list_groups(machine.state, "ann")}
    names = {command.__name__ for command in c.AnyCommand.__args__}
    assert names == set(applied), "every command changed something on the way"
