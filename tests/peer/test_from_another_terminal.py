"""Commands of one home that meet: one terminal waits for a download, another one changes it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from conftest import Peers, get, ignore, share, until

from peer import control
from peer.reports import Exit, PeerSession, Progress, State, TrimaranError
from peer.session import LocalSession, open_session

SIZE = 8 << 20
SLOW = 1 << 20


async def under_way(session: PeerSession) -> None:
    async with asyncio.timeout(10):
        while not any(row.done_bytes for row in await session.ps()):
            await asyncio.sleep(0.01)


@pytest.fixture
async def two(peers: Peers, tmp_path: Path) -> tuple[LocalSession, LocalSession]:
    """ada, who shares hull.bin, and ben."""
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(SIZE))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    return ada, ben


async def test_who_waits_is_told_that_it_was_paused(
    two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    waiting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=SLOW))
    await under_way(ben)
    await ben.pause("boats", "hull.bin")
    with pytest.raises(TrimaranError) as ended:
        await waiting
    assert ended.value.exit_code is Exit.UNFINISHED
    assert "was paused" in ended.value.message
    assert "trimaran resume boats/hull.bin" in ended.value.hint


async def test_who_waits_is_told_that_it_was_cancelled(
    two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    waiting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=SLOW))
    await under_way(ben)
    await ben.cancel("boats", "hull.bin")
    with pytest.raises(TrimaranError) as ended:
        await waiting
    assert ended.value.exit_code is Exit.UNFINISHED
    assert "was cancelled" in ended.value.message
    assert "kept" not in ended.value.hint
    assert list((tmp_path / "there").iterdir()) == []


async def test_who_waits_goes_on_waiting_while_it_is_verified(
    two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    waiting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=4 << 20))
    await under_way(ben)
    await ben.verify("boats", "hull.bin", ignore)
    report = await waiting
    assert Path(report.path).stat().st_size == SIZE


async def test_one_of_two_who_wait_may_go(two: tuple[LocalSession, LocalSession], tmp_path: Path) -> None:
    _, ben = two
    first = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=4 << 20))
    await under_way(ben)
    second = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=4 << 20))
    told: list[Progress] = []
    second.cancel()
    third = asyncio.create_task(
        get(ben, "hull.bin", tmp_path / "there", down=4 << 20, on_progress=told.append)
    )
    await until(lambda: told)
    first.cancel()
    report = await third
    assert Path(report.path).stat().st_size == SIZE


async def test_two_who_begin_at_once_begin_one_download(
    two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    ada, ben = two
    reports = await asyncio.gather(
        *(get(ben, "hull.bin", tmp_path / "there", down=4 << 20) for _ in range(3))
    )
    assert {report.path for report in reports} == {str(tmp_path / "there/hull.bin")}
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there/hull.bin"]
    assert (await ada.ps())[0].uploaded_bytes < 1.5 * SIZE
    assert len(await ben.ps()) == 1


async def test_a_download_begun_elsewhere_does_not_go_there_silently(
    two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    waiting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=SLOW))
    await under_way(ben)
    with pytest.raises(TrimaranError) as refused:
        await get(ben, "hull.bin", tmp_path / "elsewhere")
    assert refused.value.exit_code is Exit.CONFLICT
    assert str(tmp_path / "there") in refused.value.message
    assert "trimaran cancel boats/hull.bin" in refused.value.hint
    assert not (tmp_path / "elsewhere").exists()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    report = await get(ben, "hull.bin", tmp_path / "link")  # the same folder by another name
    assert Path(report.path).stat().st_size == SIZE


async def test_what_is_whole_is_whole_after_a_kick(
    peers: Peers, two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    await get(ben, "hull.bin", tmp_path / "there")
    reply = await peers.trackers.call("DELETE", "/v1/groups/boats/members/ben", session=peers.owner)
    assert reply.status == 200, reply.body
    async with asyncio.timeout(10):
        while (row := (await ben.ps())[0]).state is State.COMPLETE:
            await asyncio.sleep(0.02)
    assert (row.state, row.done_bytes) == (State.WAITING, SIZE)
    assert "no longer a member" in row.reason
    await peers.close(ben)
    ben = await open_session(peers.settings("ben"))  # type: ignore[assignment]
    try:
        assert (await ben.ps())[0].done_bytes == SIZE
    finally:
        await ben.close()


# --- over the socket ------------------------------------------------------------------------------


async def test_every_verb_means_the_same_over_the_socket(
    peers: Peers, two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    await ben.ps()
    serving = asyncio.create_task(ben.serve_forever())
    await until((peers.folder / "ben/control.sock").exists)
    beside = await open_session(peers.settings("ben"))
    assert beside.remote
    assert await beside.whoami() == await ben.whoami()
    assert await beside.limits(None) == await ben.limits(None)
    told: list[Progress] = []
    report = await beside.get(
        "boats",
        "hull.bin",
        tmp_path / "there",
        down_bytes_per_second=0,
        checksum=True,
        on_progress=told.append,
    )
    assert report.sha256
    assert told[-1].size_bytes == SIZE
    assert (await beside.verify("boats", "hull.bin", ignore)).state is State.COMPLETE
    assert await beside.ps() == await ben.ps()
    assert await beside.unshare("boats", "hull.bin") > 0
    with pytest.raises(TrimaranError) as refused:
        await beside.pause("boats", "hull.bin")
    assert refused.value.exit_code is Exit.NOT_FOUND
    with pytest.raises(AttributeError):
        beside.no_such_verb  # type: ignore[attr-defined]  # noqa: B018
    await beside.close()
    serving.cancel()


async def test_a_peer_that_stops_lets_go_of_those_who_wait_and_goes_on_at_its_next_start(
    peers: Peers, two: tuple[LocalSession, LocalSession], tmp_path: Path
) -> None:
    _, ben = two
    serving = asyncio.create_task(ben.serve_forever())
    await until((peers.folder / "ben/control.sock").exists)
    beside = await open_session(peers.settings("ben"))
    waiting = asyncio.create_task(
        beside.get(
            "boats",
            "hull.bin",
            tmp_path / "there",
            down_bytes_per_second=SLOW,
            checksum=False,
            on_progress=ignore,
        )
    )
    await under_way(ben)
    serving.cancel()
    async with asyncio.timeout(5):
        await peers.close(ben)
        with pytest.raises(TrimaranError) as ended:
            await waiting
    assert (ended.value.exit_code, ended.value.code) == (Exit.UNFINISHED, "peer-stopped")
    ben = await peers.open("ben")
    serving = asyncio.create_task(ben.serve_forever())
    await until(lambda: (tmp_path / "there/hull.bin").exists())
    serving.cancel()


async def test_a_defect_of_the_running_peer_is_told_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(verb: str, given: object, on_progress: object) -> object:
        if verb == "missing":
            return Path("/nowhere/at/all").read_bytes()
        raise KeyError("defect")

    path = tmp_path / "control.sock"
    server = control.ControlServer(path, handler)
    await server.start()
    try:
        with pytest.raises(TrimaranError) as told:
            await control.call(path, "share", {}, int)
        assert (told.value.exit_code, told.value.code) == (Exit.UNEXPECTED, "unexpected")
        assert told.value.outcome == "indefinite"
        assert str(tmp_path / "peer.log") in told.value.hint
        assert "KeyError: 'defect'" in caplog.text
        assert "Traceback" in caplog.text
        with pytest.raises(TrimaranError) as told:
            await control.call(path, "missing", {}, int)
        assert told.value.exit_code is Exit.NOT_FOUND
    finally:
        await server.stop()


async def test_the_socket_is_its_owners_and_making_it_changes_nothing_else(tmp_path: Path) -> None:
    async def handler(verb: str, given: object, on_progress: object) -> object:
        return verb

    modes: set[int] = set()
    ended = False

    async def write_files() -> None:
        number = 0
        while not ended:
            file = tmp_path / f"{number}"
            file.touch()
            modes.add(stat.S_IMODE(file.stat().st_mode))
            number += 1
            await asyncio.sleep(0)

    before = os.umask(0o022)
    try:
        writing = asyncio.create_task(write_files())
        server = control.ControlServer(tmp_path / "control.sock", handler)
        for _ in range(20):
            await server.start()
            assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o600
            assert await control.call(tmp_path / "control.sock", "ahoy", {}, str) == "ahoy"
            await server.stop()
        ended = True
        await writing
    finally:
        os.umask(before)
    assert modes == {0o644}


async def test_a_stale_socket_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(verb: str, given: object, on_progress: object) -> object:
        return verb

    path = tmp_path / ("long" * 30) / "control.sock"  # longer than the kernel takes
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        monkeypatch.chdir(path.parent)
        stale.bind("control.sock")
    server = control.ControlServer(path, handler)
    await server.start()
    assert await control.call(path, "ahoy", {}, str) == "ahoy"
    await server.stop()
    assert not path.exists()
