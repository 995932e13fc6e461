"""A command that was killed after its write took effect, and is run again: it gets the first answer."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
import pytest
from conftest import Peers
from trackers import PASSWORD

from cluster.api.errors import ApiProblem, UnknownOutcome
from cluster.api.idempotency import new_key
from cluster.api.types import Problem
from peer.records import Records
from peer.reports import Exit
from peer.writes import REPEATED_SECONDS_MAX, Writes


class Withholding:
    """A way to a tracker on which the answer to a write never arrives; `answered` when it would have."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.answered = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, hence = await asyncio.open_connection("127.0.0.1", self._port)
        wrote = False

        async def ask() -> None:
            nonlocal wrote
            while data := await reader.read(1 << 16):
                wrote = wrote or b"idempotency-key:" in data.lower()
                hence.write(data)

        asking = asyncio.create_task(ask())
        try:
            while data := await there.read(1 << 16):
                if wrote:
                    self.answered.set()
                    await asking
                    return
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            asking.cancel()
            hence.close()
            writer.close()


async def command(home: Path, trackers: str, *argv: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trimaran", *argv, "--json", "--insecure"),
        *("--home", str(home), "--trackers", trackers),
        env=kept | {"TRIMARAN_PASSWORD": PASSWORD, "TRIMARAN_NEW_PASSWORD": PASSWORD + "!"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def _nothing(peers: Peers) -> None:
    """There is all that it needs."""


async def _asks(peers: Peers) -> None:
    session = await peers.trackers.user("zoe")
    reply = await peers.trackers.call("POST", "/v1/groups/boats/join-requests", session=session)
    assert reply.status == 200


async def _is_member(peers: Peers) -> None:
    await _asks(peers)
    await peers.trackers.member("boats", "zoe", "accept", peers.owner)


@pytest.mark.parametrize(
    ("argv", "before"),
    [
        (("group", "create", "hulls"), _nothing),
        (("group", "accept", "boats", "zoe"), _asks),
        (("group", "kick", "boats", "zoe"), _is_member),
        (("group", "promote", "boats", "zoe"), _is_member),
        (("group", "delete", "boats"), _nothing),
        (("group", "leave", "boats"), _nothing),
        (("register", "yan"), _nothing),
        (("passwd",), _nothing),
    ],
    ids=lambda each: "-".join(each[:2]) if isinstance(each, tuple) else "",
)
async def test_killed_before_the_answer_and_run_again(
    peers: Peers, tmp_path: Path, argv: tuple[str, ...], before: Callable[[Peers], Awaitable[None]]
) -> None:
    ada = await peers.open("ada")
    await before(peers)
    await peers.close(ada)
    way = Withholding(peers.trackers[0].port)
    home = tmp_path / ("yan" if argv == ("register", "yan") else "ada")  # a home is one user's
    first = await command(home, await way.start(), *argv)
    try:
        async with asyncio.timeout(20):
            await way.answered.wait()
    finally:
        first.send_signal(signal.SIGKILL)
        await first.wait()
        await way.stop()
    again = await command(home, peers.trackers[1].url, *argv)
    printed, errors = await again.communicate()
    assert again.returncode == Exit.DONE, errors
    assert orjson.loads(printed)


async def test_a_key_is_kept_until_the_end_is_known_and_not_longer(tmp_path: Path) -> None:
    records = Records(tmp_path / "state.db")
    seen: list[str] = []

    async def unknown(key: str) -> None:
        seen.append(key)
        raise UnknownOutcome("lost", idempotency_key=key)

    async def refused(key: str) -> None:
        seen.append(key)
        raise ApiProblem(
            Problem(
                type="/problems/conflict",
                title="",
                status=409,
                detail="",
                outcome="definite",
                code="conflict",
            )
        )

    async def done(key: str) -> str:
        seen.append(key)
        return key

    writes = Writes(records)
    for write in (unknown, unknown):
        with pytest.raises(UnknownOutcome):
            await writes.once("join/ana/crew", write)
    assert seen[0] == seen[1]
    with pytest.raises(UnknownOutcome):
        await writes.once("join/ana/crew", unknown, body=b"other")
    assert seen[2] != seen[1], "another body is another request"
    records.close()

    records = Records(tmp_path / "state.db")
    writes = Writes(records)
    with pytest.raises(ApiProblem):
        await writes.once("join/ana/crew", refused, body=b"other")
    assert seen[3] == seen[2], "it survives a restart"
    assert await writes.once("join/ana/crew", done, body=b"other") not in seen[:4], "a refusal is an end"
    assert await writes.once("join/ana/crew", done, body=b"other") != seen[4], "and so is an answer"
    records.close()


@pytest.mark.parametrize("code", ["request-too-old", "request-mismatch"])
async def test_a_kept_key_that_tells_nothing_any_more_is_replaced(tmp_path: Path, code: str) -> None:
    records = Records(tmp_path / "state.db")
    records.put_pending("join/ana/crew", kept := new_key(), b"")
    seen: list[str] = []

    async def write(key: str) -> str:
        seen.append(key)
        if key == kept:
            indefinite = code == "request-too-old"
            raise ApiProblem(
                Problem(
                    type=f"/problems/{code}",
                    title="",
                    status=409,
                    detail="",
                    code=code,
                    outcome="indefinite" if indefinite else "definite",
                )
            )
        return key

    assert await Writes(records).once("join/ana/crew", write) == seen[1]
    assert seen[0] == kept
    assert records.pending("join/ana/crew") is None
    records.close()


async def test_a_key_from_long_ago_is_of_another_wish(tmp_path: Path) -> None:
    """Who asked to join, was let in and put out, and asks again, must not get the first asking's answer."""
    records = Records(tmp_path / "state.db")
    long_ago = time.time_ns() // 1_000_000 - round(REPEATED_SECONDS_MAX * 1000) - 1000
    records.put_pending("join/ana/crew", kept := new_key(wall_milliseconds=lambda: long_ago), b"")

    async def write(key: str) -> str:
        return key

    assert await Writes(records).once("join/ana/crew", write) != kept
    records.close()


async def test_what_cannot_be_kept_is_written_all_the_same(tmp_path: Path) -> None:
    """As on a full disk."""
    Records(tmp_path / "state.db").close()
    records = Records(tmp_path / "state.db")
    records._database.execute("PRAGMA query_only=ON")

    async def write(key: str) -> str:
        return key

    assert await Writes(records).once("join/ana/crew", write)
    assert records.pending("join/ana/crew") is None
    records.close()
