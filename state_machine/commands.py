"""Everything that can be asked of the replicated state: one struct for each command, one union.

Owned here: the shape of what travels in the log. The proposer decides, the machine obeys: time,
identifiers, salts and hashes are made before the proposal and stand in the command. What a command
does is in `rules/`; how it is encoded is in `codec.py`.

The union is versioned by tag: a command's tag and the order of its fields never change; new fields are
appended with a default, new commands get new tags. `at_ms` is the proposer's wall clock (Unix epoch,
milliseconds); it is recorded, never compared with a clock.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Command(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=False):
    """Base of all commands."""


# --- people -------------------------------------------------------------------------------------


class RegisterUser(Command, frozen=True, tag="user.register"):
    user: str
    password_hash: str  # argon2id, PHC string
    at_ms: int
    invitation_hash: str = ""  # hex SHA-256 of the invitation's code, where the policy asks for one


class ChangePassword(Command, frozen=True, tag="user.password"):
    """Replaces the hash and raises the user's session epoch: older sessions are void."""

    user: str
    password_hash: str
    at_ms: int


class RevokeSession(Command, frozen=True, tag="session.revoke"):
    user: str
    session_id: str
    expires_ms: int  # when the session would have ended by itself; then this fact may be pruned


class SetPolicy(Command, frozen=True, tag="policy.set"):
    registration: Literal["open", "invitation"]


class CreateInvitation(Command, frozen=True, tag="invitation.create"):
    invitation_hash: str
    expires_ms: int


# --- groups -------------------------------------------------------------------------------------
# `actor` is the user whose session asked; the rules check that it may.


class CreateGroup(Command, frozen=True, tag="group.create"):
    group: str
    actor: str
    at_ms: int


class DeleteGroup(Command, frozen=True, tag="group.delete"):
    group: str
    actor: str
    at_ms: int
    token_expiry_ms: int  # no token issued before now outlives this; the revocation is kept until then


class RequestJoin(Command, frozen=True, tag="group.request"):
    """Asking twice is not two requests: the second changes nothing and is answered the same."""

    group: str
    actor: str
    at_ms: int


class WithdrawRequest(Command, frozen=True, tag="group.withdraw"):
    group: str
    actor: str
    at_ms: int


class AcceptRequest(Command, frozen=True, tag="group.accept"):
    group: str
    user: str
    actor: str
    at_ms: int


class RejectRequest(Command, frozen=True, tag="group.reject"):
    group: str
    user: str
    actor: str
    at_ms: int


class LeaveGroup(Command, frozen=True, tag="group.leave"):
    """The owner's leaving hands the group to the longest-standing admin, else the longest-standing
    member; the last one out removes the group."""

    group: str
    actor: str
    at_ms: int
    token_expiry_ms: int


class KickMember(Command, frozen=True, tag="group.kick"):
    group: str
    user: str
    actor: str
    at_ms: int
    token_expiry_ms: int


class PromoteMember(Command, frozen=True, tag="group.promote"):
    group: str
    user: str
    actor: str
    at_ms: int


class DemoteMember(Command, frozen=True, tag="group.demote"):
    group: str
    user: str
    actor: str
    at_ms: int


class TransferGroup(Command, frozen=True, tag="group.transfer"):
    """The owner makes another member owner and becomes admin."""

    group: str
    user: str
    actor: str
    at_ms: int


# --- files --------------------------------------------------------------------------------------


class PublishFile(Command, frozen=True, tag="file.publish"):
    """The same manifest under its name again changes nothing but may add the sharer's peer as a seeder
    (a separate announce). Another manifest under a taken name is refused unless `replace`; only who
    shared it, or an admin, may replace."""

    group: str
    name: str
    kind: Literal["file", "folder"]
    size_bytes: int
    pieces: int
    piece_bytes: int
    algorithm: Literal["sha256", "blake3"]
    manifest_id: str
    replace: bool
    actor: str
    at_ms: int
    token_expiry_ms: int


class RemoveFile(Command, frozen=True, tag="file.remove"):
    """By who shared it, or an admin."""

    group: str
    name: str
    actor: str
    at_ms: int
    token_expiry_ms: int


# --- peers and swarms ---------------------------------------------------------------------------


class PutPeer(Command, frozen=True, tag="peer.put"):
    """Bind a peer to a user (at login, after its certificate was issued). Another user's peer is refused."""

    peer_id: str
    user: str
    at_ms: int


class Fact(msgspec.Struct, frozen=True, array_like=True):
    """What a peer holds of one version of one shared file. `pieces` 0 and `complete` False: a leecher
    that has none yet; `gone` True: it holds (or offers) it no more."""

    group: str
    name: str
    manifest_id: str
    pieces: int
    complete: bool
    gone: bool = False


class Announcement(msgspec.Struct, frozen=True, array_like=True):
    """All that one peer has to say. With `whole`, facts it does not repeat are withdrawn."""

    peer_id: str
    user: str
    addresses: tuple[str, ...]
    facts: tuple[Fact, ...]
    whole: bool = False
    leaving: bool = False  # a graceful exit: the peer leaves every swarm at once


class AnnouncePeers(Command, frozen=True, tag="peers.announce"):
    """Gathered by a node within some tens of milliseconds. Idempotent by content; carries no request
    id. Facts about groups the user is not in, or versions that are gone, are dropped one by one and
    reported back in the result (`AnnounceValue`)."""

    announcements: tuple[Announcement, ...]
    at_ms: int


class RenewPeers(Command, frozen=True, tag="peers.renew"):
    """Raises the renewal counter of each peer a node heard from since its last renewal."""

    peer_ids: tuple[str, ...]


class ExpirePeers(Command, frozen=True, tag="peers.expire"):
    """Expire each peer if its counter is still what the leader saw: (peer_id, counter)."""

    peers: tuple[tuple[str, int], ...]


class ReportPeer(Command, frozen=True, tag="peer.report"):
    group: str
    name: str
    manifest_id: str
    peer_id: str
    fault: Literal["bad_piece", "unreachable", "stalled"]
    actor: str
    at_ms: int


class LiftQuarantine(Command, frozen=True, tag="peer.lift"):
    group: str
    peer_id: str
    actor: str
    at_ms: int


# --- the cluster's own --------------------------------------------------------------------------


class PutSigningKey(Command, frozen=True, tag="key.put"):
    """A node's public key for sessions and tokens. Private keys never leave their node."""

    key_id: str
    node_id: str
    public_key: bytes  # Ed25519, raw, 32 bytes
    at_ms: int


class RetireSigningKey(Command, frozen=True, tag="key.retire"):
    """What the key signed is accepted until `valid_until_ms`, then the key may be pruned."""

    key_id: str
    valid_until_ms: int


class Prune(Command, frozen=True, tag="prune"):
    """Forget what ended before `before_ms`: revocations, revoked sessions, retired keys, invitations.
    Proposed by the leader now and then, with a margin for skewed clocks."""

    before_ms: int


AnyCommand = (
    RegisterUser
    | ChangePassword
    | RevokeSession
    | SetPolicy
    | CreateInvitation
    | CreateGroup
    | DeleteGroup
    | RequestJoin
    | WithdrawRequest
    | AcceptRequest
    | RejectRequest
    | LeaveGroup
    | KickMember
    | PromoteMember
    | DemoteMember
    | TransferGroup
    | PublishFile
    | RemoveFile
    | PutPeer
    | AnnouncePeers
    | RenewPeers
    | ExpirePeers
    | ReportPeer
    | LiftQuarantine
    | PutSigningKey
    | RetireSigningKey
    | Prune
)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What one proposal carries: a command, and (for a user's command) who asked with which request id.

    `request_hash` is SHA-256 over method, route and body as the user sent them: the same id with
    another body is refused.
    """

    command: AnyCommand
    caller: str = ""
    request_id: str = ""  # "" for the cluster's own commands and for announcements
    request_hash: bytes = b""
    version: int = 1
