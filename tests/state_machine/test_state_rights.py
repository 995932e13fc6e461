"""Who may do what, one sentence at a time."""

from __future__ import annotations

from typing import Any

import pytest
from state_worlds import MANIFESTS, PEERS, run

from state_machine import commands as c
from state_machine import limits, queries
from state_machine.events import Change
from state_machine.machine import StateMachine
from state_machine.outcomes import AnnounceValue, Applied, Code, FactDropped, Outcome, Refused

M0, M1, M2 = MANIFESTS[:3]


class World:
    """Owner `own`, admin `adm`, members `mem` and `two`, stranger `out`; each with a peer."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.machine = StateMachine(self.changes.append)
        self.users = ["own", "adm", "mem", "two", "out"]
        self.peer = dict(zip(self.users, PEERS, strict=False))
        for user in self.users:
            self.ok(c.RegisterUser(user, "h", 1))
            self.ok(c.PutPeer(self.peer[user], user, 1))
        self.ok(c.CreateGroup("g", "own", 2))
        for user in ("adm", "mem", "two"):
            self.ok(c.RequestJoin("g", user, 3))
            self.ok(c.AcceptRequest("g", user, "own", 4))
        self.ok(c.PromoteMember("g", "adm", "own", 5))
        self.ok(publish("f", M0, "mem"))

    @property
    def state(self) -> Any:
        return self.machine.state

    def ok(self, command: c.AnyCommand) -> Any:
        outcome = run(self.machine, command)
        assert isinstance(outcome, Applied), outcome
        return outcome.value

    def no(self, command: c.AnyCommand) -> Refused:
        before, seen = self.machine.digest(), len(self.changes)
        outcome = run(self.machine, command)
        assert isinstance(outcome, Refused), outcome
        assert outcome.message
        assert (self.machine.digest(), len(self.changes)) == (before, seen), "no partial effect"
        return outcome

    def role(self, user: str) -> str | None:
        member = queries.membership(self.state, "g", user)
        return member.role if member else None

    def announce(self, user: str, *facts: c.Fact, **more: Any) -> AnnounceValue:
        announcement = c.Announcement(self.peer[user], user, ("a:1",), facts, **more)
        value: AnnounceValue = self.ok(c.AnnouncePeers((announcement,), 9))[0]
        return value

    def counts(self, name: str = "f") -> tuple[int, int]:
        file = queries.show_file(self.state, "g", name)
        assert file is not None
        return file.seeders, file.leechers

    def events(self) -> list[tuple[str, str]]:
        return [(event.type, event.path) for event in self.changes[-1].events]


def publish(name: str, manifest: str, user: str, replace: bool = False) -> c.PublishFile:
    return c.PublishFile("g", name, "file", 30_000, 2, 16384, "sha256", manifest, replace, user, 6, 99)


def fact(manifest: str = M0, pieces: int = 2, complete: bool = True, **more: Any) -> c.Fact:
    return c.Fact("g", more.pop("name", "f"), manifest, pieces, complete, **more)


@pytest.fixture
def world() -> World:
    return World()


IN_GROUP = {
    "delete": lambda g, who: c.DeleteGroup(g, who, 9, 99),
    "accept": lambda g, who: c.AcceptRequest(g, "out", who, 9),
    "reject": lambda g, who: c.RejectRequest(g, "out", who, 9),
    "leave": lambda g, who: c.LeaveGroup(g, who, 9, 99),
    "kick": lambda g, who: c.KickMember(g, "two", who, 9, 99),
    "promote": lambda g, who: c.PromoteMember(g, "two", who, 9),
    "demote": lambda g, who: c.DemoteMember(g, "adm", who, 9),
    "transfer": lambda g, who: c.TransferGroup(g, "two", who, 9),
    "publish": lambda g, who: c.PublishFile(g, "n", "file", 1, 1, 16384, "sha256", M1, False, who, 9, 99),
    "remove": lambda g, who: c.RemoveFile(g, "f", who, 9, 99),
    "remove what is not there": lambda g, who: c.RemoveFile(g, "nothing", who, 9, 99),
    "report": lambda g, who: c.ReportPeer(g, "f", M0, PEERS[2], "bad_piece", who, 9),
    "lift": lambda g, who: c.LiftQuarantine(g, PEERS[2], who, 9),
}


@pytest.mark.parametrize("verb", IN_GROUP)
def test_a_stranger_is_denied_and_cannot_tell_what_exists(world: World, verb: str) -> None:
    there = world.no(IN_GROUP[verb]("g", "out"))
    nowhere = world.no(IN_GROUP[verb]("q", "out"))
    assert there.code == nowhere.code == Code.DENIED
    assert there.message.replace("'g'", "'q'") == nowhere.message
    assert (there.hint, there.field) == (nowhere.hint, nowhere.field)


# verb, and who of owner, admin, member may
RIGHTS = [
    ("delete", "own"),
    ("kick", "own adm"),
    ("promote", "own"),
    ("transfer", "own"),
    ("demote", "own adm"),
    ("publish", "own adm mem"),
    ("remove", "own adm mem"),
    ("accept", "own adm"),
    ("reject", "own adm"),
]


@pytest.mark.parametrize(("verb", "may"), RIGHTS)
@pytest.mark.parametrize("who", ["own", "adm", "mem", "two"])
def test_rights(verb: str, may: str, who: str) -> None:
    world = World()
    world.ok(c.RequestJoin("g", "out", 8))
    allowed = who in may.split() or (verb == "publish")
    if verb == "kick" and who == "two":
        return  # oneself
    if allowed:
        world.ok(IN_GROUP[verb]("g", who))
    else:
        assert world.no(IN_GROUP[verb]("g", who)).code == Code.DENIED


def test_an_admin_cannot_remove_an_admin_or_the_owner(world: World) -> None:
    world.ok(c.PromoteMember("g", "two", "own", 6))
    assert world.no(c.KickMember("g", "two", "adm", 7, 99)).code == Code.DENIED
    assert world.no(c.KickMember("g", "own", "adm", 7, 99)).code == Code.DENIED
    assert world.no(c.KickMember("g", "own", "own", 7, 99)).code == Code.CONFLICT
    world.ok(c.KickMember("g", "two", "own", 7, 99))


def test_an_admin_may_step_down_but_not_demote_others(world: World) -> None:
    world.ok(c.PromoteMember("g", "two", "own", 6))
    assert world.no(c.DemoteMember("g", "two", "adm", 7)).code == Code.DENIED
    world.ok(c.DemoteMember("g", "adm", "adm", 7))
    assert world.role("adm") == "member"


# --- groups -----------------------------------------------------------------------------------------


def test_asking_twice_is_one_request_and_can_be_withdrawn(world: World) -> None:
    world.ok(c.RequestJoin("g", "out", 8))
    revision = world.machine.revision
    world.ok(c.RequestJoin("g", "out", 9))
    assert world.machine.revision == revision
    assert [r.user for r in queries.list_join_requests(world.state, "g")] == ["out"]
    assert queries.list_groups(world.state, "out")[0].requested
    world.ok(c.WithdrawRequest("g", "out", 10))
    assert queries.list_join_requests(world.state, "g") == []
    assert world.no(c.WithdrawRequest("g", "out", 10)).code == Code.NOT_FOUND
    assert world.no(c.RequestJoin("q", "out", 8)).code == Code.NOT_FOUND


def test_the_longest_standing_admin_succeeds(world: World) -> None:
    world.ok(c.PromoteMember("g", "two", "own", 6))
    world.ok(c.PromoteMember("g", "mem", "own", 6))
    assert world.ok(c.LeaveGroup("g", "own", 7, 99)) == {"owner": "adm"}
    assert world.ok(c.LeaveGroup("g", "adm", 7, 99)) == {"owner": "two"}, "admin for longer than mem"
    assert [m.user for m in queries.list_members(world.state, "g")] == ["two", "mem"]


def test_without_admins_the_longest_standing_member_succeeds(world: World) -> None:
    world.ok(c.DemoteMember("g", "adm", "own", 6))
    assert world.ok(c.LeaveGroup("g", "own", 7, 99)) == {"owner": "adm"}
    assert world.ok(c.LeaveGroup("g", "adm", 7, 99)) == {"owner": "mem"}
    group = queries.show_group(world.state, "g", "mem")
    assert group is not None
    assert (group.owner, group.role, group.members) == ("mem", "owner", 2)


def test_the_last_one_out_removes_the_group(world: World) -> None:
    world.announce("mem", fact())
    for user in ("own", "adm", "two"):
        world.ok(c.LeaveGroup("g", user, 7, 99))
    assert world.ok(c.LeaveGroup("g", "mem", 8, 99)) == {"owner": None}
    assert world.events()[-1] == ("group.deleted", "/groups/g")
    assert queries.counts(world.state) | {"holdings": 0, "files": 0, "members": 0, "groups": 0} == (
        queries.counts(world.state)
    )
    [revocation] = queries.revocations(world.state, "g")
    assert (revocation.user, revocation.manifest_id, revocation.epoch) == ("", "", world.machine.revision)
    world.ok(c.CreateGroup("g", "out", 9))
    own = queries.membership(world.state, "g", "out")
    assert own is not None
    assert own.epoch > revocation.epoch, "a new group of the same name is not touched by it"


def test_transfer_makes_the_owner_an_admin(world: World) -> None:
    world.ok(c.TransferGroup("g", "mem", "own", 7))
    assert (world.role("mem"), world.role("own")) == ("owner", "admin")
    assert world.no(c.TransferGroup("g", "two", "own", 7)).code == Code.DENIED


def test_the_log_tells_who_did_what(world: World) -> None:
    world.ok(c.KickMember("g", "two", "adm", 8, 99))
    world.ok(c.RequestJoin("g", "out", 9))
    world.ok(c.RejectRequest("g", "out", "adm", 10))
    told = [(e.actor, e.action, e.subject) for e in queries.group_log(world.state, "g")]
    assert told == [
        ("own", "create", "g"),
        ("own", "accept", "adm"),
        ("own", "accept", "mem"),
        ("own", "accept", "two"),
        ("own", "promote", "adm"),
        ("adm", "kick", "two"),
        ("adm", "reject", "out"),
    ]


# --- people -----------------------------------------------------------------------------------------


def test_a_new_password_voids_older_sessions(world: World) -> None:
    assert queries.session_valid(world.state, "mem", "s1", 1)
    world.ok(c.RevokeSession("mem", "s1", 99))
    assert not queries.session_valid(world.state, "mem", "s1", 1)
    assert queries.session_valid(world.state, "mem", "s2", 1)
    world.ok(c.ChangePassword("mem", "new", 9))
    assert not queries.session_valid(world.state, "mem", "s2", 1)
    assert queries.session_valid(world.state, "mem", "s3", 2)
    assert queries.password_hash(world.state, "mem") == "new"
    assert not queries.session_valid(world.state, "nobody", "s3", 2)
    assert queries.password_hash(world.state, "nobody") is None


def test_registration_by_invitation(world: World) -> None:
    code, late = "a" * 64, "b" * 64
    world.ok(c.SetPolicy("invitation"))
    world.ok(c.CreateInvitation(code, 100))
    world.ok(c.CreateInvitation(late, 50))
    assert world.no(c.RegisterUser("new", "h", 60)).code == Code.DENIED
    assert world.no(c.RegisterUser("new", "h", 60, late)).code == Code.DENIED
    assert world.no(c.RegisterUser("own", "h", 60, code)).code == Code.CONFLICT
    world.ok(c.RegisterUser("new", "h", 60, code))
    assert world.no(c.RegisterUser("newer", "h", 60, code)).code == Code.DENIED, "single use"
    world.ok(c.SetPolicy("open"))
    world.ok(c.RegisterUser("newer", "h", 60))


# --- files ------------------------------------------------------------------------------------------


def test_the_same_content_again_changes_nothing(world: World) -> None:
    revision = world.machine.revision
    assert world.ok(publish("f", M0, "two")) == {"manifest_id": M0, "changed": False}
    assert world.machine.revision == revision


def test_other_content_needs_replace_and_the_right_to_it(world: World) -> None:
    assert world.no(publish("f", M1, "mem")).code == Code.CONFLICT
    assert world.no(publish("f", M1, "two", replace=True)).code == Code.DENIED
    world.ok(publish("f", M1, "mem", replace=True))
    world.ok(publish("f", M2, "adm", replace=True))
    file = queries.show_file(world.state, "g", "f")
    assert file is not None
    assert (file.manifest_id, file.shared_by) == (M2, "adm")
    assert world.no(c.RemoveFile("g", "f", "mem", 9, 99)).code == Code.DENIED, "no longer who shared it"


def test_a_replaced_version_lives_while_its_swarm_does(world: World) -> None:
    world.announce("mem", fact())
    world.announce("two", fact(pieces=1, complete=False))
    world.ok(publish("f", M1, "mem", replace=True))
    assert queries.revocations(world.state, "g") == []
    assert world.counts() == (0, 0)
    old = queries.swarm_peers(world.state, "g", "f", M0)
    assert old is not None
    assert [p.user for p in old] == ["mem", "two"]
    assert not world.announce("two", fact(pieces=2)).dropped, "the download ends"
    world.announce("two", fact(gone=True))
    world.announce("mem", fact(gone=True))
    assert queries.swarm_peers(world.state, "g", "f", M0) is None
    assert world.announce("mem", fact()).dropped[0].reason == "the group shares no such version"


def test_removing_a_file_revokes_all_its_versions(world: World) -> None:
    world.announce("mem", fact())
    world.ok(publish("f", M1, "mem", replace=True))
    world.announce("mem", fact(M1))
    world.ok(c.RemoveFile("g", "f", "mem", 9, 99))
    assert [(r.manifest_id, r.expires_ms) for r in queries.revocations(world.state, "g")] == [
        (M0, 99),
        (M1, 99),
    ]
    assert world.changes[-1].events[0].value["revoked_manifest_ids"] == [M0, M1]
    assert queries.counts(world.state)["holdings"] == 0
    assert not queries.shares_manifest(world.state, "g", M1)


def test_content_shared_under_another_name_is_not_revoked(world: World) -> None:
    world.ok(publish("copy", M0, "two"))
    world.ok(c.RemoveFile("g", "f", "mem", 9, 99))
    assert queries.revocations(world.state, "g") == []
    assert queries.shares_manifest(world.state, "g", M0)


def test_publishing_again_lifts_the_revocation(world: World) -> None:
    world.ok(c.RemoveFile("g", "f", "mem", 9, 99))
    assert len(queries.revocations(world.state, "g")) == 1
    world.ok(publish("other name", M0, "two"))
    assert queries.revocations(world.state, "g") == []


# --- swarms -----------------------------------------------------------------------------------------


def test_an_announcement_is_idempotent_and_says_what_was_dropped(world: World) -> None:
    facts = (fact(), fact(M1), c.Fact("q", "f", M0, 1, True), fact(pieces=3, complete=False))
    value = world.announce("mem", *facts, whole=True)
    assert value == AnnounceValue(
        known=True,
        whole_wanted=False,
        dropped=(
            FactDropped("g", "f", M1, "the group shares no such version"),
            FactDropped("q", "f", M0, "not a member of the group"),
            FactDropped("g", "f", M0, "the version has 2 pieces"),
        ),
    )
    digest = world.machine.digest()
    assert world.announce("mem", *facts, whole=True) == value
    assert world.machine.digest() == digest
    assert world.counts() == (1, 0)


def test_a_peer_speaks_for_its_own_user_only(world: World) -> None:
    announcement = c.Announcement(world.peer["mem"], "two", (), (fact(),))
    assert world.ok(c.AnnouncePeers((announcement,), 9)) == (AnnounceValue(False, True),)
    unknown = c.Announcement("z" * 52, "two", (), (fact(),))
    assert world.ok(c.AnnouncePeers((unknown,), 9)) == (AnnounceValue(False, True),)
    assert world.no(c.PutPeer(world.peer["mem"], "two", 9)).code == Code.CONFLICT
    assert world.counts() == (0, 0)


def test_whole_withdraws_what_is_not_repeated(world: World) -> None:
    world.ok(publish("e", M1, "mem"))
    assert world.announce("mem", fact(), fact(M1, name="e")).whole_wanted
    assert not world.announce("mem", fact(M1, name="e"), whole=True).whole_wanted
    assert (world.counts("f"), world.counts("e")) == ((0, 0), (1, 0))
    assert not world.announce("mem", fact()).whole_wanted
    assert (world.counts("f"), world.counts("e")) == ((1, 0), (1, 0))


def test_a_lease_expires_only_at_the_counter_that_was_seen(world: World) -> None:
    world.announce("mem", fact(), whole=True)
    peer_id = world.peer["mem"]
    counter = dict(queries.all_peer_counters(world.state))[peer_id]
    assert world.ok(c.RenewPeers((peer_id, world.peer["two"]))) == (world.peer["two"],)
    assert world.ok(c.ExpirePeers(((peer_id, counter),))) == ()
    assert world.counts() == (1, 0)
    renewed = dict(queries.all_peer_counters(world.state))[peer_id]
    assert renewed > counter
    assert world.ok(c.ExpirePeers(((peer_id, renewed),))) == (peer_id,)
    assert world.counts() == (0, 0)
    assert world.events() == [("swarm.left", f"/groups/g/files/f/swarm/{peer_id}")]
    assert dict(queries.all_peer_counters(world.state)) == {}
    assert world.announce("mem").whole_wanted, "it is to say everything anew"
    again = dict(queries.all_peer_counters(world.state))[peer_id]
    assert again > renewed, "no counter comes twice"


def test_a_graceful_exit_leaves_every_swarm_at_once(world: World) -> None:
    world.ok(publish("e", M1, "mem"))
    world.announce("mem", fact(), fact(M1, name="e"), whole=True)
    world.announce("mem", leaving=True)
    assert queries.counts(world.state)["holdings"] == 0
    peer = queries.peer(world.state, world.peer["mem"])
    assert peer is not None
    assert (peer.counter, peer.whole) == (None, False)


def test_a_new_address_is_told_of_every_swarm(world: World) -> None:
    world.announce("mem", fact(), whole=True)
    announcement = c.Announcement(world.peer["mem"], "mem", ("b:2",), ())
    world.ok(c.AnnouncePeers((announcement,), 9))
    [event] = world.changes[-1].events
    assert (event.type, event.value["addresses"]) == ("swarm.changed", ["b:2"])


@pytest.mark.parametrize("end", ["kick", "leave"])
def test_a_removed_members_peers_leave_and_the_right_is_revoked(world: World, end: str) -> None:
    world.announce("mem", fact(), whole=True)
    before = queries.membership(world.state, "g", "mem")
    assert before is not None
    assert queries.token_valid(world.state, "g", "mem", before.epoch, M0)
    if end == "kick":
        world.ok(c.KickMember("g", "mem", "adm", 9, 99))
    else:
        world.ok(c.LeaveGroup("g", "mem", 9, 99))
    assert world.counts() == (0, 0)
    [revocation] = queries.revocations(world.state, "g")
    assert (revocation.user, revocation.epoch) == ("mem", world.machine.revision)
    assert revocation.epoch > before.epoch
    assert not queries.token_valid(world.state, "g", "mem", before.epoch, M0)
    path = f"/groups/g/files/f/swarm/{world.peer['mem']}"
    assert world.events() == [("swarm.left", path), ("member.removed", "/groups/g/members/mem")]
    world.ok(c.RequestJoin("g", "mem", 10))
    world.ok(c.AcceptRequest("g", "mem", "own", 10))
    after = queries.membership(world.state, "g", "mem")
    assert after is not None
    assert after.epoch > revocation.epoch, "the new right is not the old one"
    world.ok(c.Prune(99))
    assert len(queries.revocations(world.state, "g")) == 1, "kept until tokens have expired"
    world.ok(c.Prune(100))
    assert queries.revocations(world.state, "g") == []


def report(world: World, who: str, fault: Any, of: str = "mem") -> Any:
    return world.ok(c.ReportPeer("g", "f", M0, world.peer[of], fault, who, 9))


def test_three_members_quarantine_a_peer_and_an_admin_lifts_it(world: World) -> None:
    world.announce("mem", fact(), whole=True)
    for who in ("two", "two", "mem", "adm", "two"):  # one liar, however loud, and the peer's own user
        assert not report(world, who, "bad_piece")["quarantined"]
    assert world.counts() == (1, 0)
    assert report(world, "own", "bad_piece")["quarantined"]
    assert world.counts() == (0, 0)
    [peer] = queries.swarm_peers(world.state, "g", "f") or []
    assert peer.quarantined
    assert [p.peer_id for p in queries.list_quarantine(world.state, "g")] == [world.peer["mem"]]
    world.announce("mem", fact(), whole=True)
    assert world.counts() == (0, 0), "announcing again does not lift it"
    assert world.no(c.LiftQuarantine("g", world.peer["mem"], "two", 9)).code == Code.DENIED
    world.ok(c.LiftQuarantine("g", world.peer["mem"], "adm", 9))
    assert world.counts() == (1, 0)
    assert not report(world, "own", "bad_piece")["quarantined"], "it begins from none"


def test_a_witness_who_was_removed_counts_no_more(world: World) -> None:
    world.announce("mem", fact(), whole=True)
    report(world, "two", "bad_piece")
    report(world, "adm", "bad_piece")
    world.ok(c.KickMember("g", "two", "own", 9, 99))
    assert not report(world, "own", "bad_piece")["quarantined"]


@pytest.mark.parametrize("fault", ["unreachable", "stalled"])
def test_two_members_hide_an_unreachable_peer_until_it_announces(world: World, fault: str) -> None:
    world.announce("mem", fact(), whole=True)
    for who in ("two", "two", "mem"):
        assert not report(world, who, fault)["hidden"]
    assert report(world, "adm", fault)["hidden"]
    assert world.counts() == (0, 0)
    assert queries.swarm_peers(world.state, "g", "f") == []
    heartbeat = c.Announcement(world.peer["mem"], "mem", (), ())
    assert queries.announcement_effect(world.state, heartbeat)[1], "worth a log entry"
    world.ok(c.AnnouncePeers((heartbeat,), 10))
    assert world.counts() == (1, 0)
    assert not queries.announcement_effect(world.state, heartbeat)[1]


def test_who_is_not_in_the_swarm_cannot_be_reported(world: World) -> None:
    outcome = world.no(c.ReportPeer("g", "f", M0, world.peer["mem"], "bad_piece", "own", 9))
    assert outcome.code == Code.NOT_FOUND


# --- keys -------------------------------------------------------------------------------------------


def test_signing_keys_come_retire_and_go(world: World) -> None:
    world.ok(c.PutSigningKey("k1", "n1", b"p" * 32, 9))
    world.ok(c.PutSigningKey("k1", "n1", b"p" * 32, 10))
    assert world.no(c.PutSigningKey("k1", "n1", b"q" * 32, 9)).code == Code.CONFLICT
    assert world.no(c.PutSigningKey("k2", "n1", b"short", 9)).code == Code.INVALID
    assert world.no(c.RetireSigningKey("k2", 50)).code == Code.NOT_FOUND
    world.ok(c.RetireSigningKey("k1", 50))
    world.ok(c.Prune(50))
    key = queries.signing_key(world.state, "k1")
    assert key is not None
    assert key.valid_until_ms == 50
    assert world.ok(c.Prune(51)) == {"pruned": 1}
    assert queries.signing_keys(world.state) == []


def test_outcomes_carry_the_revision(world: World) -> None:
    outcome: Outcome = run(world.machine, c.CreateGroup("g", "out", 9))
    assert isinstance(outcome, Refused)
    assert outcome.revision == world.machine.revision


def test_reports_are_of_limited_number_by_design() -> None:
    assert limits.QUARANTINE_WITNESSES >= 3 > limits.UNREACHABLE_WITNESSES >= 2
