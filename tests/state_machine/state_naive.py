"""A model of the replicated state that is obviously right: lists, dicts, loops; no indices, no counts
kept, nothing shared with the product but the commands and the limits.

`apply` answers "" when a command was applied and the refusal's code when it was not. The revision
rises when the model is not equal to what it was before.
"""

# ruff: noqa: RET503  (falling off the end means "applied"; that is what keeps it readable)

from __future__ import annotations

import copy
from types import SimpleNamespace as Record
from typing import Any

from state_machine import commands as c
from state_machine import limits


class NaiveModel:
    def __init__(self) -> None:
        self.revision = 0
        self.policy = "open"
        self.users: dict[str, Record] = {}
        self.invitations: dict[str, int] = {}
        self.ended_sessions: dict[tuple[str, str], int] = {}
        self.groups: dict[str, Record] = {}
        self.peers: dict[str, Record] = {}
        self.holdings: list[Record] = []
        self.quarantine: list[tuple[str, str]] = []
        self.bad: dict[tuple[str, str], list[str]] = {}
        self.revocations: list[Record] = []
        self.keys: dict[str, Record] = {}

    def apply(self, command: Any) -> str:
        before = copy.deepcopy(self.__dict__)
        self.next = self.revision + 1
        code: str = getattr(self, type(command).__name__)(command) or ""
        del self.next
        if self.__dict__.pop("came_and_went", False) or self.__dict__ != before:
            assert not code, "a refusal changes nothing"
            self.revision += 1
        return code

    # --- small questions --------------------------------------------------------------------------

    def member(self, group: str, user: str) -> Record | None:
        if group not in self.groups:
            return None
        return next((m for m in self.groups[group].members if m.user == user), None)

    def role(self, group: str, user: str) -> str | None:
        member = self.member(group, user)
        return member.role if member else None

    def log(self, command: Any, actor: str, action: str, subject: str) -> None:
        log = self.groups[command.group].log
        log.append((self.next, command.at_ms, actor, action, subject))
        del log[: -limits.GROUP_LOG_ENTRIES_MAX]

    def versions(self, group: str, name: str) -> dict[str, int]:
        """Manifest ids that can be held, with their number of pieces."""
        file = self.groups[group].files.get(name) if group in self.groups else None
        if file is None:
            return {}
        held = {h.manifest for h in self.holdings if (h.group, h.name) == (group, name)}
        old = {v.manifest: v.pieces for v in file.old if v.manifest in held}
        return {**old, file.manifest: file.pieces}

    def in_group(self, group: str, manifest: str) -> bool:
        return any(manifest in self.versions(group, name) for name in self.groups[group].files)

    def forget_empty_versions(self) -> None:
        for group, row in self.groups.items():
            for name, file in row.files.items():
                file.old = [v for v in file.old if v.manifest in self.versions(group, name)]

    def revoke(self, group: str, user: str, manifest: str, expires_ms: int) -> None:
        same = [r for r in self.revocations if (r.group, r.user, r.manifest) == (group, user, manifest)]
        expires_ms = max([expires_ms] + [r.expires for r in same])
        self.revocations = [r for r in self.revocations if r not in same]
        self.revocations.append(
            Record(group=group, user=user, manifest=manifest, epoch=self.next, expires=expires_ms)
        )

    # --- people -----------------------------------------------------------------------------------

    def RegisterUser(self, x: c.RegisterUser) -> str | None:
        if self.policy == "invitation" and self.invitations.get(x.invitation_hash, -(2**80)) <= x.at_ms:
            return "denied"
        if x.user in ("", ".", "..") or "/" in x.user:
            return "invalid"
        if x.user in self.users:
            return "conflict"
        if self.policy == "invitation":
            del self.invitations[x.invitation_hash]
        self.users[x.user] = Record(hash=x.password_hash, epoch=1)

    def ChangePassword(self, x: c.ChangePassword) -> str | None:
        if x.user not in self.users:
            return "not_found"
        self.users[x.user] = Record(hash=x.password_hash, epoch=self.users[x.user].epoch + 1)
        self.ended_sessions = {k: v for k, v in self.ended_sessions.items() if k[0] != x.user}

    def RevokeSession(self, x: c.RevokeSession) -> str | None:
        if x.user not in self.users:
            return "not_found"
        self.ended_sessions.setdefault((x.user, x.session_id), x.expires_ms)

    def SetPolicy(self, x: c.SetPolicy) -> None:
        self.policy = x.registration

    def CreateInvitation(self, x: c.CreateInvitation) -> str | None:
        if x.invitation_hash in self.invitations:
            return "conflict"
        self.invitations[x.invitation_hash] = x.expires_ms

    # --- groups -----------------------------------------------------------------------------------

    def CreateGroup(self, x: c.CreateGroup) -> str | None:
        if x.actor not in self.users:
            return "denied"
        if x.group in self.groups:
            return "conflict"
        owner = Record(user=x.actor, role="owner", since=x.at_ms, epoch=self.next, role_epoch=self.next)
        self.groups[x.group] = Record(id=self.next, members=[owner], requests=[], log=[], files={})
        self.log(x, x.actor, "create", x.group)

    def delete(self, group: str, token_expiry_ms: int) -> None:
        del self.groups[group]
        self.holdings = [h for h in self.holdings if h.group != group]
        self.quarantine = [q for q in self.quarantine if q[0] != group]
        self.bad = {k: v for k, v in self.bad.items() if k[0] != group}
        old = [r for r in self.revocations if r.group == group]
        self.revocations = [r for r in self.revocations if r.group != group]
        self.revoke(group, "", "", max([token_expiry_ms] + [r.expires for r in old]))

    def DeleteGroup(self, x: c.DeleteGroup) -> str | None:
        if self.role(x.group, x.actor) != "owner":
            return "denied"
        self.delete(x.group, x.token_expiry_ms)

    def RequestJoin(self, x: c.RequestJoin) -> str | None:
        if x.actor not in self.users:
            return "denied"
        if x.group not in self.groups:
            return "not_found"
        if self.member(x.group, x.actor):
            return "conflict"
        requests = self.groups[x.group].requests
        if any(r.user == x.actor for r in requests):
            return None
        if len(requests) >= limits.JOIN_REQUESTS_PER_GROUP_MAX:
            return "over_limit"
        requests.append(Record(user=x.actor, at=x.at_ms))

    def drop_request(self, group: str, user: str) -> bool:
        if group not in self.groups:
            return False
        requests = self.groups[group].requests
        left = [r for r in requests if r.user != user]
        self.groups[group].requests = left
        return len(left) < len(requests)

    def WithdrawRequest(self, x: c.WithdrawRequest) -> str | None:
        return None if self.drop_request(x.group, x.actor) else "not_found"

    def AcceptRequest(self, x: c.AcceptRequest) -> str | None:
        if self.role(x.group, x.actor) not in ("owner", "admin"):
            return "denied"
        if self.member(x.group, x.user):
            return "conflict"
        if not self.drop_request(x.group, x.user):
            return "not_found"
        self.groups[x.group].members.append(
            Record(user=x.user, role="member", since=x.at_ms, epoch=self.next, role_epoch=self.next)
        )
        self.log(x, x.actor, "accept", x.user)

    def RejectRequest(self, x: c.RejectRequest) -> str | None:
        if self.role(x.group, x.actor) not in ("owner", "admin"):
            return "denied"
        if self.member(x.group, x.user):
            return "conflict"
        if not self.drop_request(x.group, x.user):
            return "not_found"
        self.log(x, x.actor, "reject", x.user)

    def remove(self, group: str, user: str, token_expiry_ms: int) -> None:
        row = self.groups[group]
        row.members = [m for m in row.members if m.user != user]
        self.holdings = [
            h for h in self.holdings if not (h.group == group and self.peers[h.peer].user == user)
        ]
        self.forget_empty_versions()
        self.revoke(group, user, "", token_expiry_ms)

    def LeaveGroup(self, x: c.LeaveGroup) -> str | None:
        role = self.role(x.group, x.actor)
        if role is None:
            return "denied"
        if len(self.groups[x.group].members) == 1:
            return self.delete(x.group, x.token_expiry_ms)
        self.remove(x.group, x.actor, x.token_expiry_ms)
        self.log(x, x.actor, "leave", x.actor)
        if role == "owner":
            members = self.groups[x.group].members  # in the order of joining
            admins = [m for m in members if m.role == "admin"]
            heir = sorted(admins, key=lambda m: m.role_epoch)[0] if admins else members[0]
            heir.role, heir.role_epoch = "owner", self.next
            self.log(x, x.actor, "succeed", heir.user)
        return None

    def KickMember(self, x: c.KickMember) -> str | None:
        rank = {"member": 0, "admin": 1, "owner": 2}
        role, theirs = self.role(x.group, x.actor), self.role(x.group, x.user)
        if role not in ("owner", "admin"):
            return "denied"
        if theirs is None:
            return "not_found"
        if x.user == x.actor:
            return "conflict"
        if rank[theirs] >= rank[role]:
            return "denied"
        self.remove(x.group, x.user, x.token_expiry_ms)
        self.log(x, x.actor, "kick", x.user)

    def PromoteMember(self, x: c.PromoteMember) -> str | None:
        if self.role(x.group, x.actor) != "owner":
            return "denied"
        member = self.member(x.group, x.user)
        if member is None:
            return "not_found"
        if member.role != "member":
            return "conflict"
        member.role, member.role_epoch = "admin", self.next
        self.log(x, x.actor, "promote", x.user)

    def DemoteMember(self, x: c.DemoteMember) -> str | None:
        role = self.role(x.group, x.actor)
        if not (role == "owner" or (role == "admin" and x.user == x.actor)):
            return "denied"
        member = self.member(x.group, x.user)
        if member is None:
            return "not_found"
        if member.role != "admin":
            return "conflict"
        member.role, member.role_epoch = "member", self.next
        self.log(x, x.actor, "demote", x.user)

    def TransferGroup(self, x: c.TransferGroup) -> str | None:
        if self.role(x.group, x.actor) != "owner":
            return "denied"
        heir, owner = self.member(x.group, x.user), self.member(x.group, x.actor)
        assert owner is not None
        if heir is None:
            return "not_found"
        if heir is owner:
            return "conflict"
        owner.role, owner.role_epoch = "admin", self.next
        heir.role, heir.role_epoch = "owner", self.next
        self.log(x, x.actor, "transfer", x.user)

    # --- files ------------------------------------------------------------------------------------

    def PublishFile(self, x: c.PublishFile) -> str | None:
        role = self.role(x.group, x.actor)
        if role is None:
            return "denied"
        if x.size_bytes < 0 or x.pieces * x.piece_bytes < x.size_bytes:
            return "invalid"
        files = self.groups[x.group].files
        old = files.get(x.name)
        if old is not None:
            if old.manifest == x.manifest_id:
                return None
            if not x.replace:
                return "conflict"
            if x.actor != old.by and role == "member":
                return "denied"
        elif len(files) >= limits.FILES_PER_GROUP_MAX:
            return "over_limit"
        versions = []
        if old is not None:
            versions = [v for v in old.old if v.manifest != x.manifest_id]
            if any((h.group, h.name, h.manifest) == (x.group, x.name, old.manifest) for h in self.holdings):
                if len(versions) >= limits.VERSIONS_PER_FILE_MAX:
                    oldest = versions.pop(0).manifest
                    self.holdings = [
                        h for h in self.holdings if (h.group, h.name, h.manifest) != (x.group, x.name, oldest)
                    ]
                versions.append(Record(manifest=old.manifest, pieces=old.pieces))
        files[x.name] = Record(
            kind=x.kind, size=x.size_bytes, pieces=x.pieces, manifest=x.manifest_id,
            by=x.actor, at=x.at_ms, revision=self.next, old=versions,
        )  # fmt: skip
        self.revocations = [
            r for r in self.revocations if not (r.group == x.group and r.manifest == x.manifest_id)
        ]
        return None

    def RemoveFile(self, x: c.RemoveFile) -> str | None:
        role = self.role(x.group, x.actor)
        if role is None:
            return "denied"
        files = self.groups[x.group].files
        if x.name not in files:
            return "not_found"
        file = files[x.name]
        if x.actor != file.by and role == "member":
            return "denied"
        gone = list(self.versions(x.group, x.name))
        del files[x.name]
        self.holdings = [h for h in self.holdings if (h.group, h.name) != (x.group, x.name)]
        for manifest in gone:
            if not self.in_group(x.group, manifest):
                self.revoke(x.group, "", manifest, x.token_expiry_ms)
        if x.actor != file.by:
            self.log(x, x.actor, "remove file", x.name)
        return None

    # --- peers and swarms -------------------------------------------------------------------------

    def PutPeer(self, x: c.PutPeer) -> str | None:
        if x.user not in self.users:
            return "not_found"
        if x.peer_id in self.peers:
            return None if self.peers[x.peer_id].user == x.user else "conflict"
        own = [p for p in self.peers if self.peers[p].user == x.user]
        if len(own) >= limits.PEERS_PER_USER_MAX:
            silent = [p for p in own if self.peers[p].counter is None]
            if not silent:
                return "over_limit"
            del self.peers[min(silent, key=lambda p: self.peers[p].bound)]
        self.peers[x.peer_id] = Record(user=x.user, addresses=(), whole=False, counter=None, bound=self.next)
        return None

    def gone(self, peer_id: str) -> None:
        self.holdings = [h for h in self.holdings if h.peer != peer_id]
        self.forget_empty_versions()
        self.peers[peer_id].counter = None

    def AnnouncePeers(self, x: c.AnnouncePeers) -> None:
        for announcement in x.announcements:
            before = copy.deepcopy(self.__dict__)
            self.announce(announcement)
            if self.__dict__ != before:
                self.came_and_went = True  # a change, also if the next one undoes it

    def announce(self, a: c.Announcement) -> None:
        peer = self.peers.get(a.peer_id)
        if peer is None or peer.user != a.user:
            return None
        if a.leaving:
            return self.gone(a.peer_id)
        before = copy.deepcopy((self.holdings, self.peers))
        if peer.counter is None:
            peer.whole = False
            peer.counter = 0  # it lives; its counter is set below
        peer.whole = peer.whole or a.whole
        peer.addresses = a.addresses or peer.addresses
        said: dict[tuple[str, str, str], c.Fact] = {}
        for fact in a.facts:
            key = (fact.group, fact.name, fact.manifest_id)
            pieces = self.versions(fact.group, fact.name).get(fact.manifest_id)
            if self.member(fact.group, a.user) is None or pieces is None or not 0 <= fact.pieces <= pieces:
                continue
            swarm = [h for h in self.holdings if (h.group, h.name, h.manifest) == key]
            inside = a.peer_id in [h.peer for h in swarm] or (key in said and not said[key].gone)
            if not fact.gone and not inside and len(swarm) >= limits.SEEDERS_PER_SWARM_MAX:
                continue
            said[key] = fact
        kept, mine = [], []
        for h in self.holdings:
            if h.peer != a.peer_id:
                kept.append(h)
            elif (h.group, h.name, h.manifest) in said or a.whole:
                mine.append(h)
            else:
                kept.append(h)
                if h.hidden:
                    h.hidden, h.witnesses = False, []
        for (group, name, manifest), fact in said.items():
            if fact.gone:
                continue
            all_pieces = self.versions(group, name)[manifest]
            now = Record(
                group=group, name=name, manifest=manifest, peer=a.peer_id, complete=fact.complete,
                pieces=all_pieces if fact.complete else fact.pieces, hidden=False, witnesses=[],
            )  # fmt: skip
            same = [
                h
                for h in mine
                if (h.group, h.name, h.manifest, h.pieces, h.complete, h.hidden)
                == (group, name, manifest, now.pieces, now.complete, False)
            ]
            kept.append(same[0] if same else now)
        key_of = lambda h: (h.group, h.name, h.manifest, h.peer)  # noqa: E731
        self.holdings = sorted(kept, key=key_of)
        if (sorted(before[0], key=key_of), before[1]) != (self.holdings, self.peers):
            peer.counter = self.next
        else:
            self.holdings = before[0]
        self.forget_empty_versions()

    def RenewPeers(self, x: c.RenewPeers) -> None:
        for peer_id in x.peer_ids:
            if peer_id in self.peers and self.peers[peer_id].counter is not None:
                self.peers[peer_id].counter = self.next

    def ExpirePeers(self, x: c.ExpirePeers) -> None:
        for peer_id, counter in x.peers:
            if peer_id in self.peers and self.peers[peer_id].counter == counter:
                self.gone(peer_id)

    def ReportPeer(self, x: c.ReportPeer) -> str | None:
        if self.member(x.group, x.actor) is None:
            return "denied"
        key = (x.group, x.name, x.manifest_id, x.peer_id)
        found = [h for h in self.holdings if (h.group, h.name, h.manifest, h.peer) == key]
        if not found:
            return "not_found"
        if self.peers[x.peer_id].user == x.actor:
            return None
        holding, pair = found[0], (x.group, x.peer_id)
        if x.fault == "bad_piece":
            if pair in self.quarantine:
                return None
            users = [u for u in self.bad.get(pair, []) if self.member(x.group, u)]
            users += [x.actor] if x.actor not in users else []
            if len(users) < limits.QUARANTINE_WITNESSES:
                self.bad[pair] = users
            else:
                self.bad.pop(pair, None)
                self.quarantine.append(pair)
                self.log(x, "", "quarantine", x.peer_id)
        elif not holding.hidden and x.actor not in holding.witnesses:
            holding.witnesses = [u for u in holding.witnesses if self.member(x.group, u)] + [x.actor]
            if len(holding.witnesses) >= limits.UNREACHABLE_WITNESSES:
                holding.hidden, holding.witnesses = True, []
        return None

    def LiftQuarantine(self, x: c.LiftQuarantine) -> str | None:
        if self.role(x.group, x.actor) not in ("owner", "admin"):
            return "denied"
        if (x.group, x.peer_id) not in self.quarantine:
            return "not_found"
        self.quarantine.remove((x.group, x.peer_id))
        self.log(x, x.actor, "lift quarantine", x.peer_id)

    # --- the cluster's own ------------------------------------------------------------------------

    def PutSigningKey(self, x: c.PutSigningKey) -> str | None:
        known = self.keys.get(x.key_id)
        if known is None:
            self.keys[x.key_id] = Record(node=x.node_id, key=x.public_key, until=None)
        elif (known.node, known.key) != (x.node_id, x.public_key):
            return "conflict"
        return None

    def RetireSigningKey(self, x: c.RetireSigningKey) -> str | None:
        if x.key_id not in self.keys:
            return "not_found"
        self.keys[x.key_id].until = x.valid_until_ms

    def Prune(self, x: c.Prune) -> None:
        self.revocations = [r for r in self.revocations if r.expires >= x.before_ms]
        self.ended_sessions = {k: v for k, v in self.ended_sessions.items() if v >= x.before_ms}
        self.invitations = {k: v for k, v in self.invitations.items() if v >= x.before_ms}
        self.keys = {k: v for k, v in self.keys.items() if v.until is None or v.until >= x.before_ms}

    # --- everything that can be seen --------------------------------------------------------------

    def view(self, sessions: list[str]) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "policy": self.policy,
            "users": {
                u: (row.hash, row.epoch, [s for s in sessions if (u, s) not in self.ended_sessions])
                for u, row in self.users.items()
            },
            "invitations": self.invitations,
            "groups": {g: self.view_group(g) for g in self.groups},
            "peers": {
                p: (row.user, row.addresses, row.counter, row.whole and row.counter is not None)
                for p, row in self.peers.items()
            },
            "revocations": sorted(
                (r.group, r.user, r.manifest, r.epoch, r.expires) for r in self.revocations
            ),
            "keys": {k: (row.node, row.key, row.until) for k, row in self.keys.items()},
        }

    def view_group(self, group: str) -> dict[str, Any]:
        row = self.groups[group]
        return {
            "owner": [m.user for m in row.members if m.role == "owner"],
            "members": {m.user: (m.role, m.since, m.epoch) for m in row.members},
            "requests": [(r.user, r.at) for r in row.requests],
            "log": row.log,
            "quarantine": sorted(p for g, p in self.quarantine if g == group),
            "files": {name: self.view_file(group, name) for name in row.files},
        }

    def view_file(self, group: str, name: str) -> dict[str, Any]:
        file = self.groups[group].files[name]
        swarms = {}
        for manifest in self.versions(group, name):
            swarms[manifest] = sorted(
                (h.peer, h.pieces, h.complete, (group, h.peer) in self.quarantine)
                for h in self.holdings
                if (h.group, h.name, h.manifest, h.hidden) == (group, name, manifest, False)
            )
        counted = [h for h in swarms[file.manifest] if not h[3]]
        return {
            "file": (file.kind, file.size, file.pieces, file.manifest, file.by, file.at),
            "seeders": sum(h[2] for h in counted),
            "leechers": sum(not h[2] for h in counted),
            "swarms": swarms,
        }
