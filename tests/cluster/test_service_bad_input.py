"""What a careless or hostile client may send: always a problem document, never a 500, never an effect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trackers import PASSWORD, Trackers, file_body, peer_id, running

from cluster.api import types as t
from cluster.api.routes import ROUTES
from cluster.http import convert_body
from cluster.problems import ProblemError
from state_machine import limits


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    async with running(tmp_path, changes={"body_seconds": 0.2, "requests_max": 50}) as started:
        started.anna = await started.user("anna")
        await started.group("boats", started.anna)
        yield started


GROUPS = "/v1/groups"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b'{"name": "boa', "body"),
        (b'{"name": "boats"} x', "body"),
        (b"\xff\xfe", "body"),
        (b'{"name": "\\ud800"}', "body"),
        (b"[" * 100_000 + b"]" * 100_000, "body"),
        (b'{"name": ' + b"[" * 2_000 + b"]" * 2_000 + b"}", "body"),
        (b'{"name": NaN}', "body"),
        (b'{"name": 1e999}', "body"),
        (b'{"name": 123456789012345678901234567890}', "name"),
        (b'{"name": ""}', "name"),
        (b'{"name": "a\\u0000b"}', "name"),
        (b'{"name": "a/b"}', "name"),
        (b'{"name": ".."}', "name"),
        (b'{"name": " boats"}', "name"),
        (b'{"name": "a\\u202eb"}', "name"),
        (orjson.dumps({"name": "x" * 65}), "name"),
    ],
)
async def test_bodies_that_make_no_sense(trackers: Trackers, data: bytes, field: str) -> None:
    reply = await trackers.call("POST", GROUPS, data=data, session=trackers.anna)
    assert (reply.status, reply.code, reply.json["outcome"]) == (400, "invalid", "definite"), reply.body
    assert reply.json["field"] == field


async def test_other_than_json_is_refused(trackers: Trackers) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        reply = await trackers.call(
            "POST",
            GROUPS,
            data=b'{"name": "a"}',
            session=trackers.anna,
            headers={"Content-Type": content_type},
        )
        assert (reply.status, reply.code) == (415, "unsupported-media-type"), content_type
    reply = await trackers.call(
        "POST",
        GROUPS,
        data=b"\x1f\x8b bomb",
        session=trackers.anna,
        headers={"Content-Encoding": "gzip"},
    )
    assert (reply.status, reply.code, reply.json["field"]) == (
        415,
        "unsupported-media-type",
        "Content-Encoding",
    )
    charset = {"Content-Type": "application/json; charset=utf-8"}
    reply = await trackers.call("POST", GROUPS, body={"name": "ok"}, session=trackers.anna, headers=charset)
    assert reply.status == 200


async def test_bodies_are_bounded_with_and_without_a_length(trackers: Trackers) -> None:
    large = b'{"name": "' + b"x" * 300_000 + b'"}'
    reply = await trackers.call("POST", GROUPS, data=large, session=trackers.anna)
    assert (reply.status, reply.code) == (413, "too-large")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 10_000

    reply = await trackers.call("POST", GROUPS, data=parts(), session=trackers.anna)  # type: ignore[arg-type]
    assert (reply.status, reply.code) == (413, "too-large")
    reply = await trackers.call(
        "POST", f"{GROUPS}/boats/join-requests", data=b"x" * 1_000, session=trackers.anna
    )
    assert (reply.status, reply.code) == (413, "too-large")
    reply = await trackers.call("POST", f"{GROUPS}/boats/join-requests", data=b"[1]", session=trackers.anna)
    assert (reply.status, reply.json["field"]) == (400, "body")


async def test_a_body_that_never_ends_is_given_up(trackers: Trackers) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", trackers[0].port)
    writer.write(
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 50\r\n\r\n{"user": '
    )
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
    assert b"408" in head.split(b"\r\n")[0]
    writer.close()


async def test_connections_that_ask_for_nothing_are_closed_and_all_are_counted(tmp_path: Path) -> None:
    changes = {"silent_seconds": 0.2, "connections_max": 20, "heartbeat_seconds": 0.05}
    async with running(tmp_path, changes=changes) as trackers:
        port = trackers[0].port
        assert (await trackers.call("GET", "/healthz")).status == 200  # kept alive: this one is no idler
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        for _, writer in idle[:5]:
            writer.write(b"GET /healthz HT")
        async with asyncio.timeout(5):
            for reader, writer in idle:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
        assert (await trackers.call("GET", "/healthz")).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: x\r\n" % n for n in range(500)) + b"\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_a_400_and_no_traceback(trackers: Trackers, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", trackers[0].port)
    writer.write(raw)
    writer.write_eof()
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    assert b"Traceback" not in answer
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"404"), answer[:200]
    assert (await trackers.call("GET", "/healthz")).status == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v2/groups", 404),
        ("/v1", 404),
        ("/v1/groups/", 404),
        ("/v1/groups//files", 404),
        ("/v1/groups/boats/files/a/b/c", 404),
        ("/v1/groups/%ff/files", 400),
        ("/v1/groups/%00/files", 403),
        ("/v1/groups/..%2f..%2fetc/files", 403),
        ("/v1/groups/" + "x" * 2_000 + "/files", 403),
        ("/v1/groups?min_revision=-1", 400),
        ("/v1/groups?min_revision=x", 400),
        ("/v1/groups?min_revision=" + "9" * 40, 400),
        ("/v1/groups?consistency=whatever", 400),
        ("/v1/groups?min_revision=123456789", 503),
        ("/v1/watch?prefix=x", 400),
        ("/v1/watch?since=x", 400),
        ("/v1/watch?" + "&".join(["prefix=/a"] * 300), 400),
    ],
)
async def test_paths_and_parameters(trackers: Trackers, path: str, status: int) -> None:
    from yarl import URL

    url = URL(trackers[0].url + path, encoded=True)
    async with trackers.http.get(url, headers={"Authorization": f"Bearer {trackers.anna}"}) as response:
        body = await response.read()
        assert response.status == status, body
        assert orjson.loads(body)["outcome"] == "definite"


async def test_unknown_methods_are_told_which_there_are(trackers: Trackers) -> None:
    reply = await trackers.call("PATCH", GROUPS, session=trackers.anna)
    assert (reply.status, reply.code, reply.headers["Allow"]) == (405, "method-not-allowed", "GET, POST")


async def test_a_defect_becomes_a_problem_without_detail(
    trackers: Trackers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect() -> dict[str, Any]:
        raise RuntimeError("the secret is 1234")

    monkeypatch.setattr(trackers[0].service, "barrier", defect)
    reply = await trackers.call("GET", GROUPS, session=trackers.anna)
    assert (reply.status, reply.code, reply.json["outcome"]) == (500, "internal", "indefinite")
    assert b"1234" not in reply.body
    assert b"Traceback" not in reply.body


async def test_ends_of_proposals_say_whether_it_may_have_happened(trackers: Trackers) -> None:
    async def create(name: str, key: str | None = None) -> Any:
        return await trackers.call("POST", GROUPS, body={"name": name}, session=trackers.anna, key=key)

    cluster, consensus = trackers.cluster, trackers[0].consensus
    cluster.disk_full = True
    reply = await create("a")
    assert (reply.status, reply.code, reply.json["outcome"]) == (503, "disk-full", "definite")
    assert (await trackers.call("GET", "/readyz")).body == b"disk full\n"
    cluster.disk_full, cluster.overloaded = False, True
    reply = await create("a")
    assert (reply.status, reply.code) == (503, "overloaded")
    assert "Retry-After" in reply.headers
    cluster.overloaded = False
    cluster.leader = None
    reply = await create("a")
    assert (reply.status, reply.code, reply.json["outcome"]) == (503, "unavailable", "definite")
    cluster.leader = "n1"

    from cluster.api.idempotency import new_key

    key = new_key()
    consensus.lose_answers = True
    reply = await create("b", key)
    assert (reply.status, reply.code, reply.json["outcome"]) == (504, "outcome-unknown", "indefinite")
    assert "same Idempotency-Key" in reply.json["hint"]
    consensus.lose_answers = False
    again = await create("b", key)
    assert again.status == 200, again.body
    names = [g["name"] for g in (await trackers.call("GET", GROUPS, session=trackers.anna)).json["groups"]]
    assert names == ["b", "boats"]


async def test_too_many_requests_at_once_are_sent_away(trackers: Trackers) -> None:
    trackers[0].consensus.lose_answers = True
    calls = [
        asyncio.create_task(trackers.call("POST", GROUPS, body={"name": f"g{n}"}, session=trackers.anna))
        for n in range(70)
    ]
    done, _ = await asyncio.wait(calls)
    codes = sorted({call.result().code for call in done})
    assert codes == ["outcome-unknown", "overloaded"]


async def test_an_announcement_of_thousands_of_facts_is_taken_whole(trackers: Trackers) -> None:
    peer = await trackers.peer("p", trackers.anna)
    reply = await trackers.call("PUT", f"{GROUPS}/boats/files/hull", body=file_body(), session=trackers.anna)
    assert reply.status == 200
    fact = {"group": "boats", "name": "hull", "manifest_id": file_body()["manifest_id"], "complete": True}
    unknown = [
        {
            "group": "boats",
            "name": "n" * 200 + str(n),
            "manifest_id": "0" * 64,
            "pieces": 0,
            "complete": False,
        }
        for n in range(5_000)
    ]
    for whole in (True, True):
        facts = [{**fact, "pieces": 2}, *unknown]
        reply = await trackers.announce(peer, trackers.anna, whole=whole, facts=facts)
        assert reply.status == 200, reply.body[:500]
        assert len(reply.json["dropped"]) == 5_000
        assert not reply.json["whole_wanted"]
    swarm = await trackers.call("GET", f"{GROUPS}/boats/files/hull/swarm", session=trackers.anna)
    assert [peer["complete"] for peer in swarm.json["peers"]] == [True]
    too_many = [{**fact, "pieces": 2}] * (limits.FACTS_PER_ANNOUNCE_MAX + 1)
    reply = await trackers.announce(peer, trackers.anna, facts=too_many)
    assert (reply.status, reply.json["field"]) == (400, "facts")


async def test_failed_sign_ins_are_limited_by_account_and_address(trackers: Trackers) -> None:
    async def sign_in(user: str, password: str) -> Any:
        return await trackers.call("POST", "/v1/sessions", body={"user": user, "password": password}, key="")

    most = trackers[0].service.settings.attempts_per_account
    for _ in range(most - 1):
        assert (await sign_in("anna", "wrong")).code == "bad-credentials"
    assert (await sign_in("anna", PASSWORD)).status == 200, "success forgets the failures"
    for _ in range(most):
        assert (await sign_in("anna", "wrong")).code == "bad-credentials"
    reply = await sign_in("anna", PASSWORD)
    assert (reply.status, reply.code) == (429, "rate-limited")
    assert int(reply.headers["Retry-After"]) > 200
    assert (await sign_in("nobody", "wrong")).code == "bad-credentials", "another account is not concerned"


def test_peer_ids_in_tests_have_the_real_form() -> None:
    assert len(peer_id("x")) == limits.PEER_ID_CHARS


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_BODIES = [route.body for route in ROUTES if route.body is not None]


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(body=st.sampled_from(_BODIES), raw=_JSON, names=st.data())
def test_any_json_is_a_body_or_names_its_fault(body: type, raw: Any, names: st.DataObject) -> None:
    if names.draw(st.booleans()):
        fields = st.sampled_from(list(t.Struct.__struct_fields__ or body.__struct_fields__))  # type: ignore[attr-defined]
        raw = names.draw(st.dictionaries(fields, _JSON))
    try:
        converted = convert_body(raw, body)
    except ProblemError as problem:
        assert problem.kind.status == 400
        assert problem.field
    else:
        assert isinstance(converted, body)
