"""Walks the route table: who is refused where. A route that is not in `SAMPLES` fails the walk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trackers import PASSWORD, Reply, Trackers, file_body, manifest_id, peer_id, running

from cluster.api.routes import BY_NAME, ROUTES, Access, Route
from cluster.api.tokens import Claims, SessionClaims, sign_session
from cluster.http import build_table
from state_machine.commands import RetireSigningKey

ANNAS = peer_id("anna's")
BENS = peer_id("ben's")


@dataclass(frozen=True)
class Sample:
    """A request that a member (an admin, the owner) may make, and how strangers to the group are
    answered: 403 where the group's inside is concerned, 200 or 404 where everyone may."""

    path: str
    body: Any = None
    stranger: int = 403
    secret: str = ""  # what no stranger may find in the answer


FACT = {"group": "boats", "name": "hull.bin", "manifest_id": manifest_id("a"), "pieces": 2, "complete": True}
ANNOUNCEMENT = {"addresses": ["http://h:1"], "facts": []}
SEEDER = {"manifest_id": manifest_id("a"), "pieces": 2, "complete": True, "addresses": ["http://h:1"]}
REPORT = {"name": "hull.bin", "manifest_id": manifest_id("a"), "peer_id": ANNAS, "fault": "bad_piece"}
NODE = {"id": "n9", "raft": "h:1", "http": "https://h:2", "key_fingerprint": ""}
JOIN = {"id": "n9", "secret": "guess", "raft": "h:1", "http": "h:2", "csr_pem": "", "peer_ca_csr_pem": ""}

SAMPLES: dict[str, Sample] = {
    "status": Sample("/v1/status", stranger=200),
    "list_nodes": Sample("/v1/cluster/nodes"),
    "add_node": Sample("/v1/cluster/nodes", NODE),
    "remove_node": Sample("/v1/cluster/nodes/n2"),
    "invite_node": Sample("/v1/cluster/invites", {"id": "n9", "raft": "h:1"}),
    "join_node": Sample("/v1/cluster/joins", JOIN, stranger=403),
    "transfer_leadership": Sample("/v1/cluster/leader", {"to": "n2"}),
    "reset_password": Sample("/v1/cluster/users/anna/password", {"new_password": PASSWORD}),
    "set_policy": Sample("/v1/policy", {"registration": "open"}),
    "create_invitation": Sample("/v1/invitations", {}),
    "register": Sample("/v1/users", {"user": "anna", "password": PASSWORD}, stranger=409),
    "login": Sample("/v1/sessions", {"user": "anna", "password": "wrong"}, stranger=401),
    "logout": Sample("/v1/sessions/current", stranger=200),
    "whoami": Sample("/v1/sessions/current", stranger=200),
    "change_password": Sample(
        "/v1/users/me/password", {"password": "wrong", "new_password": PASSWORD}, stranger=401
    ),
    "list_groups": Sample("/v1/groups", stranger=200),
    "create_group": Sample("/v1/groups", {"name": "boats"}, stranger=409),
    "show_group": Sample("/v1/groups/boats", stranger=200, secret='"members":[{'),
    "delete_group": Sample("/v1/groups/boats"),
    "list_members": Sample("/v1/groups/boats/members"),
    "put_member": Sample("/v1/groups/boats/members/anna", {"change": "promote"}),
    "remove_member": Sample("/v1/groups/boats/members/anna"),
    "list_join_requests": Sample("/v1/groups/boats/join-requests"),
    "request_join": Sample("/v1/groups/boats/join-requests", stranger=200),
    "delete_join_request": Sample("/v1/groups/boats/join-requests/anna"),
    "group_log": Sample("/v1/groups/boats/log"),
    "list_files": Sample("/v1/groups/boats/files"),
    "show_file": Sample("/v1/groups/boats/files/hull.bin"),
    "publish_file": Sample("/v1/groups/boats/files/hull.bin", file_body()),
    "remove_file": Sample("/v1/groups/boats/files/hull.bin"),
    "show_swarm": Sample("/v1/groups/boats/files/hull.bin/swarm"),
    "put_seeder": Sample(f"/v1/groups/boats/files/hull.bin/seeders/{ANNAS}", SEEDER),
    "delete_seeder": Sample(f"/v1/groups/boats/files/hull.bin/seeders/{ANNAS}"),
    "report_peer": Sample("/v1/groups/boats/reports", REPORT),
    "list_quarantine": Sample("/v1/groups/boats/quarantine"),
    "lift_quarantine": Sample(f"/v1/groups/boats/quarantine/{ANNAS}"),
    "issue_token": Sample("/v1/groups/boats/tokens", {"peer_id": BENS}),
    "list_revocations": Sample("/v1/groups/boats/revocations"),
    "list_keys": Sample("/v1/keys", stranger=200),
    "put_peer": Sample(f"/v1/peers/{ANNAS}", {"csr_pem": ""}, stranger=409),
    "announce": Sample(f"/v1/peers/{ANNAS}/announce", ANNOUNCEMENT),
    "watch": Sample("/v1/watch?since=999999", stranger=410),
    "health": Sample("/healthz", stranger=200),
    "ready": Sample("/readyz", stranger=200),
    "metrics": Sample("/metrics", stranger=200),
    "openapi": Sample("/openapi.json", stranger=200),
}


class OneOperatorElsewhere:
    """Certificates are checked, and nobody here has an operator's."""

    def operator_of(self, connection: object) -> str | None:
        return None

    async def certify_peer(self, peer: str, csr_pem: str) -> tuple[str, int]:
        return "", 0

    async def invite_node(self, body: object) -> str:
        raise AssertionError("nobody gets this far")

    async def join_node(self, body: object) -> Any:
        from cluster.authority import AuthorityError

        raise AuthorityError("The invite is not valid.", denied=True)


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    """anna owns boats and shares a file; ben has a group of his own; carl was in boats and was kicked; dan is in no
    group."""
    async with running(tmp_path, 2, authority=OneOperatorElsewhere()) as started:
        started.anna = anna = await started.user("anna")
        started.ben, started.carl = await started.user("ben"), await started.user("carl")
        started.dan = await started.user("dan")
        await started.group("boats", anna, {"carl": started.carl})
        await started.group("ships", started.ben)
        reply = await started.call("PUT", "/v1/groups/boats/files/hull.bin", body=file_body(), session=anna)
        assert reply.status == 200
        await started.peer("anna's", anna)
        await started.peer("ben's", started.ben)
        assert (await started.announce(ANNAS, anna, whole=True, facts=[FACT])).status == 200
        assert (await started.call("DELETE", "/v1/groups/boats/members/carl", session=anna)).status == 200
        yield started


def test_every_route_has_a_sample_and_every_sample_a_route() -> None:
    assert SAMPLES.keys() == BY_NAME.keys()


def test_a_route_without_a_handler_does_not_start() -> None:
    from cluster.handlers import HANDLERS

    with pytest.raises(ValueError, match="without a handler: announce"):
        build_table({name: handler for name, handler in HANDLERS.items() if name != "announce"})
    with pytest.raises(ValueError, match="without a route: stray"):
        build_table({**HANDLERS, "stray": HANDLERS["status"]})


async def _try(trackers: Trackers, route: Route, session: str | None, **more: Any) -> Reply:
    sample = SAMPLES[route.name]
    return await trackers.call(route.method, sample.path, body=sample.body, session=session, **more)


def _check(route: Route, reply: Reply, status: int, why: str) -> None:
    assert reply.status == status, f"{route.name}, {why}: {reply.status} {reply.body!r}"
    if status >= 400 and route.name not in ("ready",):
        problem = reply.json
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert problem["status"] == status
        assert {"type", "title", "detail", "outcome", "hint", "node", "leader", "term", "revision"} <= (
            problem.keys()
        )
        assert problem["outcome"] == "definite"


def _forgeries(trackers: Trackers) -> dict[str, str]:
    """Sessions in anna's name that none of them may be taken for."""
    service = trackers[0].service
    now_ms = service.wall_ms()
    claims = SessionClaims(
        user="anna", session_id="s", epoch=1, issued_at_ms=now_ms, expires_at_ms=now_ms + 60_000
    )
    own = Ed25519PrivateKey.generate()
    payload = {"aud": "session", "sub": "anna", "sid": "s", "epoch": 1, "iat": 0, "exp": 1 << 40}
    key_id = service.keys.key_id
    public = service.key_ring[key_id].public_key.public_bytes_raw()
    token = service.keys.sign_token(
        Claims(
            user="anna",
            peer_id=ANNAS,
            group="boats",
            epoch=1,
            issued_at_ms=now_ms,
            expires_at_ms=now_ms + 60_000,
        )
    )
    old = SessionClaims(user="anna", session_id="s", epoch=1, issued_at_ms=0, expires_at_ms=now_ms - 1_000)
    return {
        "garbage": "garbage",
        "another's key": sign_session(claims, own, key_id),
        "unknown key": sign_session(claims, own, "nobody"),
        "no signature": jwt.encode(payload, None, algorithm="none", headers={"kid": key_id}),
        "HMAC with the public key": jwt.encode(payload, public, algorithm="HS256", headers={"kid": key_id}),
        "a piece token": token,
        "expired": service.keys.sign_session(old),
        "another epoch": service.keys.sign_session(
            SessionClaims(
                user="anna", session_id="s", epoch=9, issued_at_ms=now_ms, expires_at_ms=now_ms + 60_000
            )
        ),
        "no such user": service.keys.sign_session(
            SessionClaims(
                user="nobody", session_id="s", epoch=1, issued_at_ms=now_ms, expires_at_ms=now_ms + 60_000
            )
        ),
    }


async def test_no_session_and_forged_sessions_are_refused_before_anything_else(trackers: Trackers) -> None:
    forgeries = _forgeries(trackers)
    for route in ROUTES:
        if route.access is not Access.SESSION:
            continue
        _check(route, await _try(trackers, route, None), 401, "no session")
        for why, session in forgeries.items():
            if route.name == "logout" and why in ("another epoch", "no such user"):
                continue  # genuine, and ended: there is nothing left to end
            _check(route, await _try(trackers, route, session), 401, why)
        # Also for a group that does not exist, and a body that makes no sense: the session comes first.
        path = SAMPLES[route.name].path.replace("boats", "nothing")
        reply = await trackers.call(route.method, path, data=b"{", session=None)
        _check(route, reply, 401, "no session and no sense")


async def test_a_key_that_was_retired_signs_for_nobody(trackers: Trackers) -> None:
    service = trackers[0].service
    assert (await trackers.call("GET", "/v1/groups", session=trackers.anna)).status == 200
    await service.write_own(RetireSigningKey(service.keys.key_id, service.wall_ms() - 1))
    for route in ROUTES:
        if route.access is Access.SESSION:
            for node in (0, 1):
                _check(route, await _try(trackers, route, trackers.anna, node=node), 401, "an old key")


async def test_a_session_that_ended_opens_nothing(trackers: Trackers) -> None:
    """Signed out, or the password was changed: whoever stole it meanwhile has nothing."""
    signed_out = await trackers.login("anna")
    assert (await trackers.call("DELETE", "/v1/sessions/current", session=signed_out)).status == 200
    before = await trackers.login("anna")
    body = {"password": PASSWORD, "new_password": PASSWORD + "!"}
    assert (
        await trackers.call("PUT", "/v1/users/me/password", body=body, session=trackers.anna)
    ).status == 200
    for route in ROUTES:
        if route.access is Access.SESSION and route.name != "logout":
            for why, session in (("signed out", signed_out), ("before the new password", before)):
                _check(route, await _try(trackers, route, session), 401, why)


@pytest.mark.parametrize("who", ["ben", "carl", "dan"])
async def test_strangers_to_a_group_learn_nothing_of_it(trackers: Trackers, who: str) -> None:
    """ben is a member of another group; carl was kicked; dan never was in any."""
    session = getattr(trackers, who)
    before = trackers[0].machine.revision
    for route in ROUTES:
        sample = SAMPLES[route.name]
        if route.name in ("logout", "request_join", "create_group"):
            continue  # these change something of the stranger's own
        expected = sample.stranger
        if route.name == "delete_join_request":
            expected = 403
        reply = await _try(trackers, route, session)
        _check(route, reply, expected, who)
        if sample.secret:
            assert sample.secret not in reply.body.decode()
        if route.in_group and expected == 403:
            for hidden in ("hull.bin", manifest_id("a"), "http://127"):
                assert hidden not in reply.body.decode().replace("hull.bin'", ""), route.name
            elsewhere = SAMPLES[route.name].path.replace("boats", "nothing")
            other = await trackers.call(route.method, elsewhere, body=sample.body, session=session)
            same = reply.json | {"detail": reply.json["detail"].replace("boats", "nothing")}
            del same["revision"]
            assert same.items() <= other.json.items(), f"{route.name} tells that the group exists"
    assert trackers[0].machine.revision == before, "a refused request changed something"


async def test_operators_routes_need_a_certificate(trackers: Trackers) -> None:
    for route in ROUTES:
        if route.access is Access.OPERATOR:
            for session in (None, trackers.anna):
                reply = await _try(trackers, route, session)
                _check(route, reply, 403, "no certificate")
                assert reply.code == "operators-only"


async def test_writes_need_a_request_id(trackers: Trackers) -> None:
    for route in ROUTES:
        if not route.writes or route.access is Access.OPERATOR:  # whose certificate is asked for first
            continue
        for key in ("", "x", "00000000-0000-4000-8000-000000000000", "ffffffff-ffff-7fff-8fff-ffffffffffff"):
            reply = await _try(trackers, route, trackers.anna, key=key)
            assert (reply.status, reply.code) == (400, "invalid"), f"{route.name}, {key!r}: {reply.body!r}"
            assert reply.json["field"] == "Idempotency-Key"


async def test_bodies_of_wrong_types_name_the_field(trackers: Trackers) -> None:
    for route in ROUTES:
        if route.body is None or route.access is Access.OPERATOR:
            continue
        sample = SAMPLES[route.name]
        for body in ([], "text", 7, None):
            reply = await trackers.call(route.method, sample.path, data=_json(body), session=trackers.anna)
            assert (reply.status, reply.code) == (400, "invalid"), f"{route.name} {body!r}: {reply.body!r}"
        for name in sample.body:
            for wrong in ({"x": 1}, [[[]]], -1.5):
                body = sample.body | {name: wrong}
                reply = await trackers.call(route.method, sample.path, body=body, session=trackers.anna)
                assert (reply.status, reply.code) == (400, "invalid"), f"{route.name} {body}: {reply.body!r}"
                assert reply.json["field"].partition("[")[0].partition(".")[0] == name, reply.json
        reply = await trackers.call(
            route.method, sample.path, body=sample.body | {"surplus": 1}, session=trackers.anna
        )
        assert reply.json["field"] == "surplus", reply.body


def _json(value: Any) -> bytes:
    import orjson

    return orjson.dumps(value)


async def test_reads_without_a_quorum_are_refused_and_writes_are_definitely_not_done(
    trackers: Trackers,
) -> None:
    trackers[1].consensus.cut_off = True
    unneeded = {"status", "health", "ready", "metrics", "openapi", "announce", "join_node", "login"}
    for route in ROUTES:
        if route.name in unneeded or route.access is Access.OPERATOR:
            continue
        reply = await _try(trackers, route, trackers.anna, node=1)
        if route.name == "change_password":
            assert reply.status == 503
            continue
        _check(route, reply, 503, "no quorum")
        assert reply.code == "unavailable"
        assert reply.json["leader"] is None
    status = await trackers.call("GET", "/v1/status", node=1)
    assert (status.json["quorum"], status.json["ready"], status.json["reason"]) == (False, False, "no quorum")
    ready = await trackers.call("GET", "/readyz", node=1)
    assert (ready.status, ready.body) == (503, b"no quorum\n")
    stale = await trackers.call("GET", "/v1/groups?consistency=stale", session=trackers.anna, node=1)
    assert stale.status == 200
    inside = await trackers.call(
        "GET", "/v1/groups/boats/files?consistency=stale", session=trackers.anna, node=1
    )
    assert inside.status == 503, "membership decides about access, so it is never read stale"
