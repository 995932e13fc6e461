"""From nothing to a swarm, through HTTP, on three nodes: the way everyone goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from trackers import PASSWORD, Trackers, file_body, manifest_id, running

from cluster.api.idempotency import new_key


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    async with running(tmp_path, 3) as started:
        yield started


async def test_from_registration_to_a_swarm(trackers: Trackers) -> None:
    anna, ben = await trackers.user("anna"), await trackers.user("ben", node=1)
    await trackers.group("boats", anna, {"ben": ben})
    reply = await trackers.call("GET", "/v1/groups", session=ben, node=2)
    assert reply.json["groups"] == [
        {"name": "boats", "owner": "anna", "members": 2, "role": "member", "requested": False}
    ]
    assert {"node": "n3", "leader": "n1", "term": 1}.items() <= reply.json.items()

    reply = await trackers.call(
        "PUT", "/v1/groups/boats/files/hull.bin", body=file_body(), session=anna, node=1
    )
    assert reply.status == 200, reply.body
    assert reply.json["file"]["shared_by"] == "anna"

    peer = await trackers.peer("anna's", anna, node=2)
    fact = {"group": "boats", "name": "hull.bin", "manifest_id": manifest_id("a"), "pieces": 2}
    reply = await trackers.announce(peer, anna, whole=True, facts=[{**fact, "complete": True}], node=1)
    assert reply.status == 200, reply.body
    assert reply.json["dropped"] == []
    assert not reply.json["whole_wanted"]

    reply = await trackers.call("GET", "/v1/groups/boats/files/hull.bin/swarm", session=ben, node=2)
    assert reply.json["peers"] == [
        {
            "peer_id": peer,
            "user": "anna",
            "addresses": ["http://127.0.0.1:9000"],
            "pieces": 2,
            "complete": True,
            "quarantined": False,
        }
    ]
    reply = await trackers.call("GET", "/v1/groups/boats/files", session=ben)
    assert [(file["seeders"], file["leechers"]) for file in reply.json["files"]] == [(1, 0)]


async def test_a_write_repeated_on_another_node_gets_the_first_answer(trackers: Trackers) -> None:
    anna = await trackers.user("anna")
    key = new_key()
    first = await trackers.call("POST", "/v1/groups", body={"name": "boats"}, session=anna, key=key)
    again = await trackers.call("POST", "/v1/groups", body={"name": "boats"}, session=anna, key=key, node=2)
    assert (first.status, again.status) == (200, 200)
    assert first.json["revision"] == again.json["revision"]

    other = await trackers.call("POST", "/v1/groups", body={"name": "ships"}, session=anna, key=key, node=1)
    assert (other.status, other.code, other.json["outcome"]) == (422, "request-mismatch", "definite")
    assert other.json["field"] == "Idempotency-Key"


async def test_registering_repeated_gets_the_first_answer_and_another_password_is_another_request(
    trackers: Trackers,
) -> None:
    key, body = new_key(), {"user": "anna", "password": PASSWORD}
    first = await trackers.call("POST", "/v1/users", body=body, key=key)
    again = await trackers.call("POST", "/v1/users", body=body, key=key, node=1)
    assert (first.status, again.status, first.json["revision"]) == (200, 200, again.json["revision"])
    other = await trackers.call("POST", "/v1/users", body=body | {"password": "another one"}, key=key)
    assert other.code == "request-mismatch"
    taken = await trackers.call("POST", "/v1/users", body=body)
    assert (taken.status, taken.code) == (409, "conflict")


async def test_changing_the_password_ends_sessions_everywhere_and_can_be_repeated(trackers: Trackers) -> None:
    anna = await trackers.user("anna")
    body, key = {"password": PASSWORD, "new_password": "a new password"}, new_key()
    path = "/v1/users/me/password"
    first = await trackers.call("PUT", path, body=body, session=anna, key=key)
    assert first.status == 200, first.body
    again = await trackers.call("PUT", path, body=body, session=anna, key=key, node=2)
    assert (again.status, again.json["revision"]) == (200, first.json["revision"])
    other = await trackers.call("PUT", path, body=body, session=anna, node=2)
    assert (other.status, other.code) == (401, "unauthenticated")
    for node in range(3):
        assert (await trackers.call("GET", "/v1/groups", session=anna, node=node)).status == 401
    reply = await trackers.call("POST", "/v1/sessions", body={"user": "anna", "password": PASSWORD}, node=1)
    assert reply.code == "bad-credentials"
    await trackers.login("anna", "a new password", node=1)


async def test_signing_out_ends_this_session_alone_and_is_idempotent(trackers: Trackers) -> None:
    anna, other = await trackers.user("anna"), await trackers.login("anna", node=1)
    for node in (0, 1, 2):
        reply = await trackers.call("DELETE", "/v1/sessions/current", session=anna, node=node)
        assert reply.status == 200, reply.body
        assert (await trackers.call("GET", "/v1/sessions/current", session=anna, node=node)).status == 401
    assert (await trackers.call("GET", "/v1/sessions/current", session=other)).json["user"] == "anna"
