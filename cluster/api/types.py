"""The wire types of the tracker's HTTP API: what a body may be, what an answer is.

Bodies are decoded by orjson and checked by `msgspec.convert(..., strict=True)` into these; answers are
built from them. Names are contracts (`docs/reference/http.md` is generated from here and from
`routes.py`). Times are Unix epoch milliseconds, UTC, named `..._at_ms`; `since`, `requested_at` and
`expires_at` are RFC 3339 strings for people and scripts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from state_machine import limits

UserName = Annotated[str, Meta(min_length=1, max_length=limits.USER_NAME_CHARS_MAX)]
GroupName = Annotated[str, Meta(min_length=1, max_length=limits.GROUP_NAME_CHARS_MAX)]
FileName = Annotated[str, Meta(min_length=1, max_length=limits.FILE_NAME_BYTES_MAX)]
PASSWORD_CHARS_MIN = 8
Password = Annotated[str, Meta(min_length=PASSWORD_CHARS_MIN, max_length=1024)]
PeerId = Annotated[str, Meta(pattern=r"^[a-z2-7]{52}$")]
ManifestId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
NodeId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Address = Annotated[str, Meta(min_length=1, max_length=limits.ADDRESS_CHARS_MAX)]

ROLE = Literal["owner", "admin", "member"]
KIND = Literal["file", "folder"]
ALGORITHM = Literal["sha256", "blake3"]


class Body(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: an unknown field is an error that names it."""


class Answer(Struct, frozen=True, kw_only=True):
    """Base of all answers. Every answer says who answered, and as of when."""

    node: str = ""
    leader: str | None = None
    term: int = 0
    revision: int = 0


class Done(Answer, frozen=True, kw_only=True):
    """The answer of verbs that have nothing to tell but that it is done."""


# --- cluster ------------------------------------------------------------------------------------


class NodeView(Struct, frozen=True, kw_only=True):
    id: str
    address: str  # the node's HTTP URL
    raft: str
    role: Literal["leader", "follower", "candidate", "learner", "removed"]
    reachable: bool
    applied: int
    committed: int


class StatusAnswer(Answer, frozen=True, kw_only=True):
    cluster_id: str
    quorum: bool
    ready: bool
    reason: str = ""  # why not ready
    nodes: list[NodeView]
    version: str


class AddNodeBody(Body, frozen=True, kw_only=True):
    id: NodeId
    raft: Address
    http: Address
    key_fingerprint: str


class InviteBody(Body, frozen=True, kw_only=True):
    id: NodeId
    raft: Address
    valid_seconds: int = 86_400


class InviteAnswer(Answer, frozen=True, kw_only=True):
    invite: str  # the file's content: opaque, single use, expiring; holds a secret


class JoinBody(Body, frozen=True, kw_only=True):
    """Sent by `tracker init --join`, authenticated by the invite's secret alone."""

    id: NodeId
    secret: str
    http: Address
    raft: Address
    csr_pem: str  # the node's own key
    peer_ca_csr_pem: str  # the node's intermediate, which certifies peers


class JoinAnswer(Answer, frozen=True, kw_only=True):
    cluster_id: str
    ca_pem: str
    certificate_pem: str
    peer_ca_certificate_pem: str
    members: list[AddNodeBody]
    ca_key_pem: str = ""  # so that no node is the only one that can invite and renew


class TransferBody(Body, frozen=True, kw_only=True):
    to: NodeId | None = None


class PolicyBody(Body, frozen=True, kw_only=True):
    registration: Literal["open", "invitation"]


class InvitationBody(Body, frozen=True, kw_only=True):
    valid_seconds: int = 7 * 86_400


class InvitationAnswer(Answer, frozen=True, kw_only=True):
    invitation: str


# --- people -------------------------------------------------------------------------------------


class RegisterBody(Body, frozen=True, kw_only=True):
    user: UserName
    password: Password
    invitation: str = ""


class RegisterAnswer(Answer, frozen=True, kw_only=True):
    user: str


class SessionBody(Body, frozen=True, kw_only=True):
    user: UserName
    password: Annotated[str, Meta(min_length=1, max_length=1024)]


class SessionAnswer(Answer, frozen=True, kw_only=True):
    user: str
    session: str  # bearer token
    expires_at: str


class WhoAnswer(Answer, frozen=True, kw_only=True):
    user: str


class ResetBody(Body, frozen=True, kw_only=True):
    new_password: Password


class PasswordBody(Body, frozen=True, kw_only=True):
    password: Annotated[str, Meta(min_length=1, max_length=1024)]
    new_password: Password


# --- groups -------------------------------------------------------------------------------------


class GroupBody(Body, frozen=True, kw_only=True):
    name: GroupName


class GroupView(Struct, frozen=True, kw_only=True):
    name: str
    owner: str
    members: int
    role: ROLE | None  # the caller's
    requested: bool = False  # the caller has asked to join


class GroupsAnswer(Answer, frozen=True, kw_only=True):
    groups: list[GroupView]


class MemberView(Struct, frozen=True, kw_only=True):
    user: str
    role: ROLE
    since: str


class GroupAnswer(Answer, frozen=True, kw_only=True):
    """`members` is listed for members; for others it is the empty list, and `member_count` tells."""

    name: str
    owner: str
    role: ROLE | None
    member_count: int
    members: list[MemberView]


class MemberBody(Body, frozen=True, kw_only=True):
    """`PUT members/{user}`. `change` says which verb is meant; the machine checks that it fits."""

    change: Literal["accept", "promote", "demote", "transfer"]


class JoinRequestView(Struct, frozen=True, kw_only=True):
    user: str
    requested_at: str


class JoinRequestsAnswer(Answer, frozen=True, kw_only=True):
    requests: list[JoinRequestView]


class LogView(Struct, frozen=True, kw_only=True):
    revision: int
    at: str
    actor: str
    action: str
    subject: str


class LogAnswer(Answer, frozen=True, kw_only=True):
    entries: list[LogView]


# --- files and swarms ---------------------------------------------------------------------------


class FileBody(Body, frozen=True, kw_only=True):
    kind: KIND
    size_bytes: Annotated[int, Meta(ge=0, le=limits.FILE_SIZE_BYTES_MAX)]
    pieces: Annotated[int, Meta(ge=0, le=limits.PIECES_PER_FILE_MAX)]
    piece_bytes: Annotated[int, Meta(ge=limits.PIECE_BYTES_MIN, le=limits.PIECE_BYTES_MAX)]
    algorithm: ALGORITHM
    manifest_id: ManifestId
    replace: bool = False


class FileView(Struct, frozen=True, kw_only=True):
    group: str
    name: str
    kind: KIND
    size_bytes: int
    pieces: int
    piece_bytes: int
    algorithm: ALGORITHM
    manifest_id: str
    seeders: int
    leechers: int
    shared_by: str
    shared_at: str


class FilesAnswer(Answer, frozen=True, kw_only=True):
    files: list[FileView]


class FileAnswer(Answer, frozen=True, kw_only=True):
    file: FileView


class SwarmPeer(Struct, frozen=True, kw_only=True):
    peer_id: str
    user: str
    addresses: list[str]
    pieces: int
    complete: bool
    quarantined: bool = False


class SwarmAnswer(Answer, frozen=True, kw_only=True):
    """`GET .../swarm?manifest_id=` (default: the current version's)."""

    group: str
    name: str
    manifest_id: str
    peers: list[SwarmPeer]


class PeerBody(Body, frozen=True, kw_only=True):
    csr_pem: Annotated[str, Meta(max_length=8192)]  # proves the peer holds its key; "" only when insecure


class PeerAnswer(Answer, frozen=True, kw_only=True):
    peer_id: str
    certificate_pem: str  # leaf, then the node's intermediate; "" when the cluster runs insecure
    expires_at: str


class FactBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    group: GroupName
    name: FileName
    manifest_id: ManifestId
    pieces: Annotated[int, Meta(ge=0, le=limits.PIECES_PER_FILE_MAX)]
    complete: bool
    gone: bool = False


class AnnounceBody(Body, frozen=True, kw_only=True):
    addresses: Annotated[list[Address], Meta(max_length=limits.ADDRESSES_PER_PEER_MAX)]
    facts: Annotated[list[FactBody], Meta(max_length=limits.FACTS_PER_ANNOUNCE_MAX)]
    whole: bool = False
    leaving: bool = False


class DroppedFact(Struct, frozen=True, kw_only=True):
    group: str
    name: str
    manifest_id: str
    reason: str


class AnnounceAnswer(Answer, frozen=True, kw_only=True):
    lease_seconds: float
    announce_seconds: float  # announce again within this, even with nothing new
    whole_wanted: bool  # the trackers do not know this peer (any more): say everything
    dropped: list[DroppedFact]


class SeederBody(Body, frozen=True, kw_only=True):
    manifest_id: ManifestId
    pieces: Annotated[int, Meta(ge=0, le=limits.PIECES_PER_FILE_MAX)]
    complete: bool
    addresses: Annotated[list[Address], Meta(max_length=limits.ADDRESSES_PER_PEER_MAX)]


class ReportBody(Body, frozen=True, kw_only=True):
    name: FileName
    manifest_id: ManifestId
    peer_id: PeerId
    fault: Literal["bad_piece", "unreachable", "stalled"]


class QuarantineAnswer(Answer, frozen=True, kw_only=True):
    peers: list[SwarmPeer]


# --- rights -------------------------------------------------------------------------------------


class TokenBody(Body, frozen=True, kw_only=True):
    peer_id: PeerId


class TokenAnswer(Answer, frozen=True, kw_only=True):
    token: str
    epoch: int
    issued_at_ms: int
    expires_at_ms: int


class SigningKeyView(Struct, frozen=True, kw_only=True):
    key_id: str
    node_id: str
    public_key: str  # base64url, raw Ed25519
    valid_until_ms: int | None


class KeysAnswer(Answer, frozen=True, kw_only=True):
    keys: list[SigningKeyView]


class RevocationView(Struct, frozen=True, kw_only=True):
    """Tokens with an epoch below `epoch` are void: all (user and manifest empty), a user's, or for one
    version of one file."""

    group: str
    user: str = ""
    manifest_id: str = ""
    epoch: int


class RevocationsAnswer(Answer, frozen=True, kw_only=True):
    revocations: list[RevocationView]


# --- watch --------------------------------------------------------------------------------------


class WatchEvent(Struct, frozen=True, kw_only=True):
    type: str
    path: str
    value: Any


class WatchMessage(Struct, frozen=True, kw_only=True):
    """One server-sent event; its id is the revision. A comment line `: hb` is the heartbeat."""

    revision: int
    events: list[WatchEvent]


# --- errors -------------------------------------------------------------------------------------


class Problem(Struct, frozen=True, kw_only=True):
    """RFC 9457, `application/problem+json`."""

    type: str  # a page under docs/reference/problems, e.g. "/problems/not-a-member"
    title: str
    status: int
    detail: str
    outcome: Literal["definite", "indefinite"]
    hint: str = ""
    field: str = ""
    code: str = ""  # the last part of `type`
    retry_after_seconds: float | None = None
    node: str = ""
    leader: str | None = None
    term: int = 0
    revision: int = 0
