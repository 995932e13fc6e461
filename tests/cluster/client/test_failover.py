"""The client against real servers that die, hang, refuse and break off."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid

import pytest
from aiohttp import web
from small_trackers import (
    Behaviour,
    MakeClient,
    StartTracker,
    done,
    drop,
    half_an_answer,
    hang,
    in_turn,
    no_leader,
    problem,
)

from chaos_tests.ports import free_ports
from cluster.api.errors import ApiProblem, TrackerError, Unavailable, UnknownOutcome
from cluster.api.idempotency import new_key

SOON_SECONDS = 1.5
"""The product's bound is 1 s; the rest is for a machine that runs other tests at the same time."""


class Unanswering:
    """A port that takes connections and says nothing: a frozen machine, seen through its kernel."""

    def __enter__(self) -> str:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(8)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.mark.parametrize("behave", [hang, no_leader, half_an_answer, drop])
@pytest.mark.parametrize("verb", ["read", "write"])
async def test_moves_on_within_a_second(
    tracker: StartTracker, client: MakeClient, behave: Behaviour, verb: str
) -> None:
    bad, good = await tracker(behave), await tracker(done)
    trackers = client(bad, good)
    begin = time.monotonic()
    if verb == "write":
        assert (await trackers.create_group("g")).revision == 7
    else:
        assert await trackers.health()
    assert time.monotonic() - begin < SOON_SECONDS
    assert len(bad.seen) == 1
    assert len(good.seen) == 1


async def test_a_dead_and_a_frozen_tracker_cost_less_than_a_second(
    tracker: StartTracker, client: MakeClient
) -> None:
    good = await tracker(done)
    with Unanswering() as frozen:
        trackers = client(f"http://127.0.0.1:{free_ports(1)[0]}", frozen, good)
        begin = time.monotonic()
        await trackers.create_group("g")
        assert time.monotonic() - begin < SOON_SECONDS
        begin = time.monotonic()
        for number in range(20):
            await trackers.create_group(f"g{number}")
        assert time.monotonic() - begin < SOON_SECONDS, "what was found out is remembered"
    assert len(good.seen) == 21


async def test_one_key_for_one_write_across_trackers_and_retries(
    tracker: StartTracker, client: MakeClient
) -> None:
    first = await tracker(in_turn(drop, no_leader, no_leader))
    second = await tracker(in_turn(half_an_answer, no_leader, done))
    trackers = client(first, second)
    await trackers.create_group("g")
    keys = {seen.key for seen in first.seen + second.seen}
    assert len(keys) == 1
    assert uuid.UUID(keys.pop() or "").version == 7
    assert len(second.seen) == 3
    assert len({seen.body for seen in first.seen + second.seen}) == 1
    await trackers.create_group("g")
    assert len({seen.key for seen in first.seen + second.seen}) == 2, "another write, another key"


async def test_a_kept_key_is_sent_as_given(tracker: StartTracker, client: MakeClient) -> None:
    good = await tracker(done)
    key = new_key()
    await client(good).create_group("g", key=key)
    await client(good).create_group("g", key=key)
    assert [seen.key for seen in good.seen] == [key, key]


async def test_a_refusal_is_final_and_asked_once(tracker: StartTracker, client: MakeClient) -> None:
    async def taken(request: web.Request, body: bytes) -> web.StreamResponse:
        return problem(409, "name-taken")

    first, second = await tracker(taken), await tracker(done)
    with pytest.raises(ApiProblem) as caught:
        await client(first, second).create_group("g")
    assert (caught.value.status, caught.value.code, caught.value.outcome) == (409, "name-taken", "definite")
    assert not second.seen


async def test_nobody_there_is_definite(client: MakeClient) -> None:
    trackers = client(*(f"http://127.0.0.1:{port}" for port in free_ports(2))).within(1.0)
    begin = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await trackers.create_group("g")
    assert caught.value.outcome == "definite"
    assert time.monotonic() - begin < 1.6


async def test_without_a_leader_is_definite(tracker: StartTracker, client: MakeClient) -> None:
    with pytest.raises(Unavailable) as caught:
        await client(await tracker(no_leader), await tracker(no_leader)).within(0.8).create_group("g")
    assert "because no-leader" in caught.value.message


@pytest.mark.parametrize("behave", [drop, half_an_answer, hang])
async def test_a_write_that_may_have_arrived_is_never_called_undone(
    tracker: StartTracker, client: MakeClient, behave: Behaviour
) -> None:
    bad = await tracker(in_turn(behave, no_leader))
    with pytest.raises(UnknownOutcome) as caught:
        await client(bad, await tracker(no_leader)).within(1.0).create_group("g")
    assert caught.value.outcome == "indefinite"
    assert caught.value.idempotency_key == bad.seen[0].key


async def test_an_indefinite_problem_stays_indefinite(tracker: StartTracker, client: MakeClient) -> None:
    async def unsure(request: web.Request, body: bytes) -> web.StreamResponse:
        return problem(504, "outcome-unknown", "indefinite")

    with pytest.raises(UnknownOutcome):
        await client(await tracker(unsure), await tracker(no_leader)).within(2.5).create_group("g")


async def test_a_session_refused_after_a_lost_answer_decides_nothing(
    tracker: StartTracker, client: MakeClient
) -> None:
    """Signing out ends the session: the retry is refused because the first attempt worked."""

    async def signed_out(request: web.Request, body: bytes) -> web.StreamResponse:
        return problem(401, "session-unknown")

    with pytest.raises(UnknownOutcome):
        await client(await tracker(drop), await tracker(signed_out)).logout()


async def test_a_read_that_failed_is_definite(tracker: StartTracker, client: MakeClient) -> None:
    with pytest.raises(Unavailable):
        await client(await tracker(drop)).within(0.5).list_groups()


async def test_operators_verbs_are_not_repeated_in_the_dark(
    tracker: StartTracker, client: MakeClient
) -> None:
    bad, good = await tracker(drop), await tracker(done)
    with pytest.raises(UnknownOutcome):
        await client(bad, good).remove_node("n3")
    assert len(bad.seen) == 1
    assert not good.seen


async def test_waits_for_an_election(tracker: StartTracker, client: MakeClient) -> None:
    until = time.monotonic() + 1.2

    async def electing(request: web.Request, body: bytes) -> web.StreamResponse:
        return await (no_leader if time.monotonic() < until else done)(request, body)

    trackers = client(*[await tracker(electing) for _ in range(3)])
    await trackers.create_group("g")
    assert time.monotonic() - until < 2.5


async def test_retries_are_rationed(tracker: StartTracker, client: MakeClient) -> None:
    """An outage must not multiply the load: fifty calls, two trackers, two seconds of refusals."""
    one, two = await tracker(no_leader), await tracker(no_leader)
    trackers = client(one, two).within(2.0)
    ends = await asyncio.gather(*(trackers.create_group(f"g{n}") for n in range(50)), return_exceptions=True)
    assert all(isinstance(end, Unavailable) for end in ends)
    requests = len(one.seen) + len(two.seen)
    assert requests <= 50 + 10 + 3 + 2, f"{requests} requests for 50 calls"


async def test_the_better_tracker_is_preferred(tracker: StartTracker, client: MakeClient) -> None:
    async def slow(request: web.Request, body: bytes) -> web.StreamResponse:
        await asyncio.sleep(0.1)
        return await done(request, body)

    first, second = await tracker(slow), await tracker(done)
    trackers = client(first, second)
    for number in range(10):
        await trackers.create_group(f"g{number}")
    assert len(second.seen) >= 8


async def test_a_tracker_that_returns_is_used_again(tracker: StartTracker, client: MakeClient) -> None:
    only = await tracker(done)
    trackers = client(only)
    await trackers.create_group("a")
    port = only.port
    await only.stop()
    with pytest.raises(TrackerError):
        await trackers.within(0.5).create_group("b")
    await only.start(port)
    await trackers.create_group("c")


async def test_a_client_certificate_is_not_needed_to_be_told_what_is_wrong(client: MakeClient) -> None:
    with pytest.raises(Unavailable) as caught:
        client("http://a:1", insecure=False)
    assert caught.value.code == "insecure-tracker"
    with pytest.raises(Unavailable):
        client()
    for text in ("https://", "ftp://a:1", "https://a:99999", ""):
        with pytest.raises(Unavailable):
            client(text)


async def test_other_programs_are_recognised(tracker: StartTracker, client: MakeClient) -> None:
    async def page(request: web.Request, body: bytes) -> web.StreamResponse:
        return web.Response(status=404, text="<html>nothing here", content_type="text/html")

    with pytest.raises(Unavailable) as caught:
        await client(await tracker(page)).within(0.5).whoami()
    assert "not as a tracker does" in caught.value.message
