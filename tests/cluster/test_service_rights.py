"""Rights given and taken back: tokens, revocations, keys, quarantine, invitations, operators."""

from __future__ import annotations

from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from trackers import PASSWORD, Trackers, file_body, manifest_id, peer_id, running

from cluster.api.idempotency import new_key
from cluster.api.tokens import Claims, Revocations, TokenError, TokenFault, VerifyingKey, verify_token
from cluster.consensus import MembershipError, MembershipUnknownError
from state_machine import queries

BENS = peer_id("ben's")


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    async with running(tmp_path, 2) as started:
        for user in ("anna", "ben", "carl", "dora", "emil"):
            setattr(started, user, await started.user(user))
        members = {user: getattr(started, user) for user in ("ben", "carl", "dora", "emil")}
        await started.group("boats", started.anna, members)
        await started.call("PUT", "/v1/groups/boats/files/hull", body=file_body(), session=started.anna)
        await started.peer("ben's", started.ben)
        yield started


async def keys(trackers: Trackers, node: int = 0) -> dict[str, VerifyingKey]:
    """What a peer knows: fetched, not taken from the inside."""
    reply = await trackers.call("GET", "/v1/keys", session=trackers.ben, node=node)
    return {
        key["key_id"]: VerifyingKey.from_raw(
            key["key_id"], urlsafe_b64decode(key["public_key"] + "="), key["valid_until_ms"]
        )
        for key in reply.json["keys"]
    }


async def token(trackers: Trackers, user: str = "ben", node: int = 0) -> tuple[int, dict[str, Any]]:
    reply = await trackers.call(
        "POST",
        "/v1/groups/boats/tokens",
        body={"peer_id": BENS},
        session=getattr(trackers, user),
        key="",
        node=node,
    )
    return reply.status, reply.json


async def revocations(trackers: Trackers, group: str = "boats") -> Revocations:
    reply = await trackers.call("GET", f"/v1/groups/{group}/revocations", session=trackers.anna)
    known = Revocations()
    known.replace(group, [(r["user"], r["manifest_id"], r["epoch"]) for r in reply.json["revocations"]])
    return known


def now_ms(trackers: Trackers) -> int:
    return trackers[0].service.wall_ms()


async def claims_of(trackers: Trackers, node: int = 0) -> Claims:
    status, answer = await token(trackers, node=node)
    assert status == 200, answer
    return verify_token(
        answer["token"],
        await keys(trackers, 1 - node),
        now_ms(trackers),
        peer_id=BENS,
        group="boats",
    )


async def test_a_token_of_any_node_is_verified_with_what_any_other_tells(trackers: Trackers) -> None:
    for node in (0, 1):
        claims = await claims_of(trackers, node)
        assert (claims.user, claims.peer_id, claims.group) == ("ben", BENS, "boats")
        assert claims.expires_at_ms - claims.issued_at_ms == 30 * 60 * 1000
        assert not (await revocations(trackers)).covers(claims, manifest_id("a"))


async def test_no_token_for_anothers_peer(trackers: Trackers) -> None:
    status, answer = await token(trackers, "carl")
    assert (status, answer["code"], answer["field"]) == (403, "denied", "peer_id")


@pytest.mark.parametrize("way", ["kicked", "left", "deleted"])
async def test_what_ends_a_membership_voids_its_tokens_and_a_new_one_begins_anew(
    trackers: Trackers, way: str
) -> None:
    before = await claims_of(trackers)
    match way:
        case "kicked":
            reply = await trackers.call("DELETE", "/v1/groups/boats/members/ben", session=trackers.anna)
        case "left":
            reply = await trackers.call("DELETE", "/v1/groups/boats/members/ben", session=trackers.ben)
        case _:
            reply = await trackers.call("DELETE", "/v1/groups/boats", session=trackers.anna)
            assert reply.status == 200
            await trackers.group("boats", trackers.anna)
            await trackers.call("PUT", "/v1/groups/boats/files/hull", body=file_body(), session=trackers.anna)
    assert reply.status == 200, reply.body
    for node in (0, 1):
        status, answer = await token(trackers, node=node)
        assert (status, answer["code"]) == (403, "denied")
    assert (await revocations(trackers)).covers(before)

    await trackers.call("POST", "/v1/groups/boats/join-requests", session=trackers.ben)
    await trackers.member("boats", "ben", "accept", trackers.anna)
    after = await claims_of(trackers)
    known = await revocations(trackers)
    assert not known.covers(after, manifest_id("a"))
    assert known.covers(before), "the old right does not revive"


async def test_a_removed_file_voids_tokens_for_it_alone(trackers: Trackers) -> None:
    before = await claims_of(trackers)
    reply = await trackers.call("DELETE", "/v1/groups/boats/files/hull", session=trackers.anna)
    assert reply.status == 200
    known = await revocations(trackers)
    assert known.covers(before, manifest_id("a"))
    assert not known.covers(before, manifest_id("other"))


async def test_keys_rotate_with_an_overlap_and_nothing_fails(tmp_path: Path) -> None:
    """Time is given: a key lives 10 s here, the new one is announced and used half of that later."""
    clock = [1_800_000_000_000]
    changes = {"signing_key_seconds": 10.0, "session_seconds": 100.0}
    async with running(tmp_path, changes=changes, wall_ms=lambda: clock[0]) as trackers:
        trackers.ben = await trackers.user("ben")
        service = trackers[0].service
        first = service.keys.key_id
        private = list((tmp_path / "n1" / "signing").glob("*.key"))
        assert [path.stem for path in private] == [first]
        assert private[0].stat().st_mode & 0o777 == 0o600

        clock[0] += 10_001
        await service.keys.tend()  # makes a new one
        await service.keys.tend()  # announces it
        assert service.keys.key_id == first, "nobody is asked to believe a key he has not heard of"
        assert len(await keys(trackers)) == 2
        session = await trackers.login("ben")
        clock[0] += 5_001
        await service.keys.tend()
        second = service.keys.key_id
        assert second != first
        retired = (await keys(trackers))[first]
        assert retired.valid_until_ms is not None
        assert retired.valid_until_ms >= clock[0] + 100_000, "until its last session has ended"
        assert not (tmp_path / "n1" / "signing" / f"{first}.key").exists()
        assert (await trackers.call("GET", "/v1/groups", session=session)).status == 200
        renewed = await trackers.login("ben")
        assert (await trackers.call("GET", "/v1/groups", session=renewed)).status == 200
        clock[0] += 110_000
        expired = await trackers.call("GET", "/v1/groups", session=renewed)
        assert (expired.status, expired.code) == (401, "unauthenticated")


async def test_a_restarted_node_signs_with_the_key_it_had(tmp_path: Path) -> None:
    from cluster.keys import NodeKeys

    async with running(tmp_path) as trackers:
        service = trackers[0].service

        async def propose(command: object) -> bool:
            raise AssertionError(f"nothing is to be announced again: {command}")

        again = NodeKeys(trackers[0].machine, service.settings, "n1", propose, service.wall_ms)
        again.load()
        await again.tend()
        assert again.key_id == service.keys.key_id


async def test_a_lost_key_folder_means_a_new_key_and_the_old_one_retired(tmp_path: Path) -> None:
    from cluster.keys import NodeKeys

    clock = [1_800_000_000_000]
    async with running(tmp_path, wall_ms=lambda: clock[0]) as trackers:
        service, machine = trackers[0].service, trackers[0].machine
        old = service.keys.key_id
        for path in (tmp_path / "n1" / "signing").iterdir():
            path.unlink()

        async def propose(command: Any) -> bool:
            await service.write_own(command)
            return True

        again = NodeKeys(machine, service.settings, "n1", propose, service.wall_ms)
        again.load()
        await again.tend()
        assert again.ready and again.key_id != old
        clock[0] += 120_000
        await again.tend()
        row = queries.signing_key(machine.state, old)
        assert row is not None and row.valid_until_ms is not None


async def test_removing_a_node_retires_its_keys_within_a_tokens_life(trackers: Trackers) -> None:
    key_id = trackers[1].service.keys.key_id
    reply = await trackers.call("DELETE", "/v1/cluster/nodes/n2", key="")
    assert reply.status == 200, reply.body
    assert trackers[0].consensus.changes == [("remove", "n2")]
    until_ms = (await keys(trackers))[key_id].valid_until_ms
    assert until_ms is not None
    assert now_ms(trackers) + 29 * 60_000 < until_ms < now_ms(trackers) + 32 * 60_000
    assert (await trackers.call("DELETE", "/v1/cluster/nodes/n7", key="")).status == 404


async def test_membership_changes_say_whether_they_may_have_happened(trackers: Trackers) -> None:
    node = {"id": "n9", "raft": "h:1", "http": "http://h:2", "key_fingerprint": ""}
    trackers[0].consensus.membership_error = MembershipError("another change is under way")
    reply = await trackers.call("POST", "/v1/cluster/nodes", body=node, key="")
    assert (reply.status, reply.json["outcome"], reply.json["detail"]) == (
        409,
        "definite",
        "another change is under way",
    )
    assert "cluster status" in reply.json["hint"], "files and members of groups have nothing to do with it"
    trackers[0].consensus.membership_error = MembershipUnknownError("not confirmed in time")
    reply = await trackers.call("POST", "/v1/cluster/nodes", body=node, key="")
    assert (reply.status, reply.json["outcome"]) == (504, "indefinite")


async def report(trackers: Trackers, user: str, fault: str = "bad_piece") -> None:
    body = {"name": "hull", "manifest_id": manifest_id("a"), "peer_id": BENS, "fault": fault}
    session = getattr(trackers, user)
    reply = await trackers.call("POST", "/v1/groups/boats/reports", body=body, session=session)
    assert reply.status == 200, reply.body


async def swarm(trackers: Trackers, user: str = "carl") -> list[dict[str, Any]]:
    reply = await trackers.call(
        "GET", "/v1/groups/boats/files/hull/swarm", session=getattr(trackers, user), node=1
    )
    peers: list[dict[str, Any]] = reply.json["peers"]
    return peers


async def test_several_witnesses_quarantine_a_peer_one_liar_does_not_and_an_admin_lifts_it(
    trackers: Trackers,
) -> None:
    fact = {"group": "boats", "name": "hull", "manifest_id": manifest_id("a"), "pieces": 2, "complete": True}
    assert (await trackers.announce(BENS, trackers.ben, whole=True, facts=[fact])).status == 200
    for _ in range(5):
        await report(trackers, "carl")
    await report(trackers, "ben")
    await report(trackers, "dora")
    assert [peer["quarantined"] for peer in await swarm(trackers)] == [False]
    await report(trackers, "emil")
    assert [peer["quarantined"] for peer in await swarm(trackers)] == [True]
    path = f"/v1/groups/boats/quarantine/{BENS}"
    listed = await trackers.call("GET", "/v1/groups/boats/quarantine", session=trackers.ben)
    assert [peer["peer_id"] for peer in listed.json["peers"]] == [BENS]
    assert (await trackers.call("DELETE", path, session=trackers.ben)).status == 403
    assert (await trackers.call("DELETE", path, session=trackers.anna)).status == 200
    assert (await trackers.call("DELETE", path, session=trackers.anna)).status == 404
    assert [peer["quarantined"] for peer in await swarm(trackers)] == [False]


async def test_an_unreachable_peer_is_hidden_until_it_announces(trackers: Trackers) -> None:
    fact = {"group": "boats", "name": "hull", "manifest_id": manifest_id("a"), "pieces": 2, "complete": True}
    peer = BENS
    await trackers.announce(peer, trackers.ben, whole=True, facts=[fact])
    await report(trackers, "carl", "unreachable")
    assert len(await swarm(trackers)) == 1
    await report(trackers, "dora", "stalled")
    assert await swarm(trackers) == []
    assert (await trackers.announce(peer, trackers.ben, node=1)).status == 200
    assert len(await swarm(trackers)) == 1


async def test_registration_by_invitation(trackers: Trackers) -> None:
    reply = await trackers.call("PUT", "/v1/policy", body={"registration": "invitation"}, key="")
    assert reply.status == 200
    body = {"user": "fred", "password": PASSWORD}
    refused = await trackers.call("POST", "/v1/users", body=body, node=1)
    assert (refused.status, refused.code, refused.json["field"]) == (403, "denied", "invitation")
    invited = await trackers.call("POST", "/v1/invitations", body={}, key="")
    code = invited.json["invitation"]
    assert code not in str(trackers.cluster.log)
    assert (await trackers.call("POST", "/v1/users", body=body | {"invitation": code}, node=1)).status == 200
    second = await trackers.call(
        "POST", "/v1/users", body={"user": "gina", "password": PASSWORD, "invitation": code}
    )
    assert second.status == 403, "it is good for one"


async def test_nothing_secret_is_in_the_log(trackers: Trackers) -> None:
    reply = await trackers.call(
        "PUT",
        "/v1/users/me/password",
        body={"password": PASSWORD, "new_password": "another password"},
        session=trackers.carl,
    )
    assert reply.status == 200
    logged = b"".join(command for entry in trackers.cluster.log for command in entry)
    import hashlib

    for secret in (PASSWORD.encode(), b"another password", trackers.ben.encode()):
        assert secret not in logged
        assert hashlib.sha256(secret).digest() not in logged
    for path in (trackers[0].service.settings.data_dir / "signing").glob("*.key"):
        assert path.read_bytes() not in logged
    assert b"$argon2id$" in logged


async def test_a_token_expires_and_one_from_an_unknown_key_is_refused(trackers: Trackers) -> None:
    _, answer = await token(trackers)
    with pytest.raises(TokenError) as caught:
        verify_token(answer["token"], await keys(trackers), answer["expires_at_ms"])
    assert caught.value.fault is TokenFault.EXPIRED
    with pytest.raises(TokenError) as caught:
        verify_token(answer["token"], {}, now_ms(trackers))
    assert caught.value.fault is TokenFault.KEY_UNKNOWN


async def test_an_operator_gives_a_user_a_new_password(trackers: Trackers) -> None:
    path, body = "/v1/cluster/users/carl/password", {"new_password": "a password that is new"}
    key = new_key()
    for node in (0, 1):  # the second time it is answered from memory
        reply = await trackers.call("PUT", path, body=body, key=key, node=node)
        assert (reply.status, reply.json["revision"]) == (200, trackers[0].machine.revision)
    assert (await trackers.call("GET", "/v1/groups/boats/members", session=trackers.carl)).status == 401
    with pytest.raises(AssertionError, match="401"):
        await trackers.login("carl")
    assert await trackers.login("carl", "a password that is new", node=1)
    other = await trackers.call("PUT", path, body={"new_password": "and another one"}, key=key)
    assert (other.status, other.code) == (422, "request-mismatch")
    missing = await trackers.call("PUT", "/v1/cluster/users/nobody/password", body=body)
    assert (missing.status, missing.json["outcome"]) == (404, "definite")
    assert (await trackers.call("PUT", path, body=body, key="")).json["field"] == "Idempotency-Key"
    short = await trackers.call("PUT", path, body={"new_password": "short"})
    assert (short.status, short.json["field"]) == (400, "new_password")
