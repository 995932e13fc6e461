"""The route table: the one list of what the HTTP API is. Server, client, OpenAPI and the tests that
walk every endpoint are made from it; a route that is not here does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from . import types as t


class Access(StrEnum):
    """Who may call. Finer rights (member, admin, owner) are the state machine's."""

    OPEN = "open"  # anyone who reaches the port
    SESSION = "session"  # a signed-in user
    OPERATOR = "operator"  # a client certificate for operators from the cluster's CA
    INVITE = "invite"  # the secret in the body


@dataclass(frozen=True, slots=True)
class Route:
    name: str  # the handler's and the client method's name
    method: str
    path: str  # aiohttp's syntax
    access: Access
    body: type | None
    answer: type | None  # None: not JSON (metrics, event stream)
    writes: bool = False  # needs Idempotency-Key
    in_group: bool = False  # membership is checked before existence
    summary: str = ""


_S, _O, _P, _I = Access.SESSION, Access.OPEN, Access.OPERATOR, Access.INVITE

ROUTES: tuple[Route, ...] = (
    Route(
        "status", "GET", "/v1/status", _O, None, t.StatusAnswer, summary="The cluster as this node sees it"
    ),
    Route("list_nodes", "GET", "/v1/cluster/nodes", _P, None, t.StatusAnswer, summary="The nodes"),
    Route("add_node", "POST", "/v1/cluster/nodes", _P, t.AddNodeBody, t.Done, summary="Add a node"),
    Route("remove_node", "DELETE", "/v1/cluster/nodes/{id}", _P, None, t.Done, summary="Remove a node"),
    Route(
        "invite_node",
        "POST",
        "/v1/cluster/invites",
        _P,
        t.InviteBody,
        t.InviteAnswer,
        summary="Invite a node",
    ),
    Route(
        "join_node", "POST", "/v1/cluster/joins", _I, t.JoinBody, t.JoinAnswer, summary="Join with an invite"
    ),
    Route(
        "transfer_leadership",
        "POST",
        "/v1/cluster/leader",
        _P,
        t.TransferBody,
        t.Done,
        summary="Move the leader",
    ),
    Route("set_policy", "PUT", "/v1/policy", _P, t.PolicyBody, t.Done, summary="Who may register"),
    Route(
        "create_invitation",
        "POST",
        "/v1/invitations",
        _P,
        t.InvitationBody,
        t.InvitationAnswer,
        summary="Invite a user",
    ),
    Route(
        "reset_password",
        "PUT",
        "/v1/cluster/users/{user}/password",
        _P,
        t.ResetBody,
        t.Done,
        writes=True,
        summary="Give a user a new password",
    ),
    Route(
        "register", "POST", "/v1/users", _O, t.RegisterBody, t.RegisterAnswer, writes=True, summary="Register"
    ),
    Route("login", "POST", "/v1/sessions", _O, t.SessionBody, t.SessionAnswer, summary="Sign in"),
    Route("logout", "DELETE", "/v1/sessions/current", _S, None, t.Done, writes=True, summary="Sign out"),
    Route("whoami", "GET", "/v1/sessions/current", _S, None, t.WhoAnswer, summary="Whose session this is"),
    Route(
        "change_password",
        "PUT",
        "/v1/users/me/password",
        _S,
        t.PasswordBody,
        t.Done,
        writes=True,
        summary="Change the password",
    ),
    Route("list_groups", "GET", "/v1/groups", _S, None, t.GroupsAnswer, summary="All groups"),
    Route(
        "create_group", "POST", "/v1/groups", _S, t.GroupBody, t.Done, writes=True, summary="Create a group"
    ),
    Route(
        "show_group",
        "GET",
        "/v1/groups/{g}",
        _S,
        None,
        t.GroupAnswer,
        in_group=True,
        summary="A group and its members",
    ),
    Route(
        "delete_group",
        "DELETE",
        "/v1/groups/{g}",
        _S,
        None,
        t.Done,
        writes=True,
        in_group=True,
        summary="Delete a group",
    ),
    Route(
        "list_members",
        "GET",
        "/v1/groups/{g}/members",
        _S,
        None,
        t.GroupAnswer,
        in_group=True,
        summary="A group's members",
    ),
    Route(
        "put_member",
        "PUT",
        "/v1/groups/{g}/members/{user}",
        _S,
        t.MemberBody,
        t.Done,
        writes=True,
        in_group=True,
        summary="Accept, promote, demote, or make owner",
    ),
    Route(
        "remove_member",
        "DELETE",
        "/v1/groups/{g}/members/{user}",
        _S,
        None,
        t.Done,
        writes=True,
        in_group=True,
        summary="Leave (oneself) or kick",
    ),
    Route(
        "list_join_requests",
        "GET",
        "/v1/groups/{g}/join-requests",
        _S,
        None,
        t.JoinRequestsAnswer,
        in_group=True,
        summary="Who asks to join",
    ),
    Route(
        "request_join",
        "POST",
        "/v1/groups/{g}/join-requests",
        _S,
        None,
        t.Done,
        writes=True,
        summary="Ask to join",
    ),
    Route(
        "delete_join_request",
        "DELETE",
        "/v1/groups/{g}/join-requests/{user}",
        _S,
        None,
        t.Done,
        writes=True,
        summary="Withdraw (oneself) or reject",
    ),
    Route(
        "group_log",
        "GET",
        "/v1/groups/{g}/log",
        _S,
        None,
        t.LogAnswer,
        in_group=True,
        summary="The log of rights",
    ),
    Route(
        "list_files",
        "GET",
        "/v1/groups/{g}/files",
        _S,
        None,
        t.FilesAnswer,
        in_group=True,
        summary="A group's files",
    ),
    Route(
        "show_file",
        "GET",
        "/v1/groups/{g}/files/{name}",
        _S,
        None,
        t.FileAnswer,
        in_group=True,
        summary="A file",
    ),
    Route(
        "publish_file",
        "PUT",
        "/v1/groups/{g}/files/{name}",
        _S,
        t.FileBody,
        t.FileAnswer,
        writes=True,
        in_group=True,
        summary="Share a file",
    ),
    Route(
        "remove_file",
        "DELETE",
        "/v1/groups/{g}/files/{name}",
        _S,
        None,
        t.Done,
        writes=True,
        in_group=True,
        summary="Take a file off the group",
    ),
    Route(
        "show_swarm",
        "GET",
        "/v1/groups/{g}/files/{name}/swarm",
        _S,
        None,
        t.SwarmAnswer,
        in_group=True,
        summary="The peers of a file",
    ),
    Route(
        "put_seeder",
        "PUT",
        "/v1/groups/{g}/files/{name}/seeders/{peer_id}",
        _S,
        t.SeederBody,
        t.Done,
        in_group=True,
        summary="This peer holds (some of) a file",
    ),
    Route(
        "delete_seeder",
        "DELETE",
        "/v1/groups/{g}/files/{name}/seeders/{peer_id}",
        _S,
        None,
        t.Done,
        in_group=True,
        summary="This peer holds it no more",
    ),
    Route(
        "report_peer",
        "POST",
        "/v1/groups/{g}/reports",
        _S,
        t.ReportBody,
        t.Done,
        writes=True,
        in_group=True,
        summary="Report a peer's fault",
    ),
    Route(
        "list_quarantine",
        "GET",
        "/v1/groups/{g}/quarantine",
        _S,
        None,
        t.QuarantineAnswer,
        in_group=True,
        summary="Quarantined peers",
    ),
    Route(
        "lift_quarantine",
        "DELETE",
        "/v1/groups/{g}/quarantine/{peer_id}",
        _S,
        None,
        t.Done,
        writes=True,
        in_group=True,
        summary="Lift a quarantine",
    ),
    Route(
        "issue_token",
        "POST",
        "/v1/groups/{g}/tokens",
        _S,
        t.TokenBody,
        t.TokenAnswer,
        in_group=True,
        summary="A token for pieces of the group's files",
    ),
    Route(
        "list_revocations",
        "GET",
        "/v1/groups/{g}/revocations",
        _S,
        None,
        t.RevocationsAnswer,
        in_group=True,
        summary="Rights withdrawn",
    ),
    Route("list_keys", "GET", "/v1/keys", _S, None, t.KeysAnswer, summary="Public signing keys"),
    Route(
        "put_peer",
        "PUT",
        "/v1/peers/{peer_id}",
        _S,
        t.PeerBody,
        t.PeerAnswer,
        summary="Bind and certify a peer",
    ),
    Route(
        "announce",
        "POST",
        "/v1/peers/{peer_id}/announce",
        _S,
        t.AnnounceBody,
        t.AnnounceAnswer,
        summary="Everything a peer has to say",
    ),
    Route("watch", "GET", "/v1/watch", _S, None, None, summary="What changes, as it changes"),
    Route("health", "GET", "/healthz", _O, None, None, summary="The process lives"),
    Route("ready", "GET", "/readyz", _O, None, None, summary="The node can answer"),
    Route("metrics", "GET", "/metrics", _O, None, None, summary="Prometheus metrics"),
    Route("openapi", "GET", "/openapi.json", _O, None, None, summary="This table, as OpenAPI 3.1"),
)

BY_NAME: dict[str, Route] = {route.name: route for route in ROUTES}
