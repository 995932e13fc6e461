"""What is interrupted, in whatever way, goes on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import Peers, full, get, share, until

from cluster.api.types import SwarmPeer
from peer import tracker_agent
from peer.home import Home
from peer.records import Records
from peer.reports import Exit, State, TrimaranError

GET = """
import asyncio, sys
from pathlib import Path
from peer.reports import PeerSettings
from peer.session import open_session

async def main(home, trackers, name, folder, down):
    settings = PeerSettings(home=Path(home), trackers=tuple(trackers.split(",")), insecure=True, listen="127.0.0.1:0")
    session = await open_session(settings)
    await session.get("boats", name, Path(folder), down_bytes_per_second=int(down), checksum=False,
                      on_progress=lambda told: print(told.done_bytes, flush=True))

asyncio.run(main(*sys.argv[1:]))
"""


async def test_killed_in_the_middle_it_fetches_only_what_is_missing(peers: Peers, tmp_path: Path) -> None:
    size = 24 << 20
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(size))
    ada = await peers.open("ada")
    await share(ada, source)
    ben = await peers.open("ben")
    settings = peers.settings("ben")
    await peers.close(ben)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GET, str(settings.home), ",".join(settings.trackers), "hull.bin",
        str(tmp_path / "there"), str(8 << 20), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while int(await process.stdout.readline()) < size // 2:
            pass
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert not (tmp_path / "there/hull.bin").exists()
    sent_before = (await ada.ps())[0].uploaded_bytes

    ben = await peers.open("ben")
    (row,) = await ben.ps()
    assert row.state is State.WAITING
    assert size // 2 <= row.done_bytes < size
    report = await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert report.received_bytes == size - row.done_bytes
    sent_again = (await ada.ps())[0].uploaded_bytes - sent_before
    assert sent_again < 0.55 * size
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there/hull.bin"]
    assert list((settings.home / "maps").iterdir()) == []


async def test_a_restarted_peer_goes_on_by_itself(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(6 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=2 << 20))
    await until_rows(ben, lambda rows: rows and rows[0].done_bytes > 0)
    await peers.close(ben)
    with contextlib.suppress(TrimaranError):
        await getting
    ben = await peers.open("ben")
    serving = asyncio.create_task(ben.serve_forever())
    await until(lambda: (tmp_path / "there/hull.bin").exists())
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    serving.cancel()


async def until_rows(session, condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        while not condition(await session.ps()):
            await asyncio.sleep(0.01)


async def test_a_part_that_somebody_worked_on_is_not_trusted(peers: Peers, tmp_path: Path) -> None:
    root = tmp_path / "boat"
    root.mkdir()
    for number in range(8):
        (root / f"{number}.bin").write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, root)
    getting = asyncio.create_task(get(ben, "boat", tmp_path / "there", down=2 << 20))
    await until_rows(ben, lambda rows: rows and rows[0].done_bytes > 2 << 20)
    await ben.pause("boats", "boat")
    await asyncio.gather(getting, return_exceptions=True)
    (part,) = (tmp_path / "there").iterdir()
    (part / "0.bin").unlink()
    (part / "0.bin").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_bytes(b"v" * (1 << 20))
    await peers.close(ben)
    ben = await peers.open("ben")
    await get(ben, "boat", tmp_path / "there")
    for number in range(8):
        assert (tmp_path / f"there/boat/{number}.bin").read_bytes() == (root / f"{number}.bin").read_bytes()
    assert (tmp_path / "victim").read_bytes() == b"v" * (1 << 20)
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there/boat"]


async def test_verify_finds_what_rotted_and_it_is_fetched_again(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(4 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=1 << 20))
    await until_rows(ben, lambda rows: rows and rows[0].done_bytes > 1 << 20)
    await ben.pause("boats", "hull.bin")
    await asyncio.gather(getting, return_exceptions=True)
    (part,) = (tmp_path / "there").iterdir()
    with part.open("r+b") as file:
        file.write(b"rotten__" * (4 << 17))  # wherever the pieces lie that came first
    row = await ben.verify("boats", "hull.bin", lambda _: None)
    assert "pieces were wrong" in row.reason
    await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()


async def test_a_kill_between_rename_and_record_is_noticed(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=256 << 10))
    await until_rows(ben, lambda rows: rows and rows[0].done_bytes > 0)
    await ben.pause("boats", "hull.bin")
    await asyncio.gather(getting, return_exceptions=True)
    await peers.close(ben)
    (part,) = (tmp_path / "there").iterdir()
    part.write_bytes(source.read_bytes())
    part.rename(tmp_path / "there/hull.bin")
    ben = await peers.open("ben")
    report = await get(ben, "hull.bin", tmp_path / "there")
    assert report.received_bytes == 0
    assert [row.state for row in await ben.ps()] == [State.COMPLETE]


async def test_no_room_is_said_before_anything_is_fetched(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(1 << 20))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((real.f_bsize, real.f_frsize, real.f_blocks, 2, 2, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(TrimaranError) as refused:
        await get(ben, "hull.bin", tmp_path / "there")
    assert refused.value.exit_code is Exit.NO_SPACE
    assert list((tmp_path / "there").iterdir()) == []
    assert (await ada.ps())[0].uploaded_bytes == 0


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root")
async def test_a_disk_that_fills_up_in_the_middle(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull"
    source.mkdir()
    for number in range(40):  # small files are not reserved: the room goes while they are written
        (source / f"{number:02}.bin").write_bytes(os.urandom(500_000))
    small = tmp_path / "small"
    small.mkdir()
    process = await asyncio.create_subprocess_exec(
        "mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", str(small)
    )
    if await process.wait():
        pytest.skip("tmpfs cannot be mounted here")
    try:
        ada, ben = await peers.open("ada"), await peers.open("ben")
        await share(ada, source)
        getting = asyncio.create_task(get(ben, "hull", small / "there", down=8 << 20))
        await until_rows(ben, lambda rows: rows and rows[0].done_bytes > 0)
        with (small / "hog").open("wb", buffering=0) as hog, contextlib.suppress(OSError):
            while True:
                hog.write(b"x" * 65536)
        with pytest.raises(TrimaranError) as refused:
            await getting
        assert refused.value.exit_code is Exit.NO_SPACE
        (small / "hog").unlink()
        report = await get(ben, "hull", small / "there")
        assert report.reused_bytes > 0
        for path in source.iterdir():
            assert (small / "there/hull" / path.name).read_bytes() == path.read_bytes()
        await peers.close(ben)
    finally:
        process = await asyncio.create_subprocess_exec("umount", "-l", str(small))
        await process.wait()


async def test_a_full_disk_does_not_end_what_a_peer_does_in_the_background(
    peers: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tokens are renewed all the same, and what is kept for outages is kept once there is room."""
    monkeypatch.setattr(tracker_agent, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(tracker_agent, "SAVED_SECONDS", 0.05)
    ada = await peers.open("ada")
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(100_000))
    await share(ada, source)
    engine = ada._engine
    assert engine is not None
    agent, records = engine.agent, engine.records
    await until(lambda: records.setting("known") is not None and records.setting("rights") is not None)
    full(records, True)
    peer = SwarmPeer(
        peer_id="p" * 64, user="ben", addresses=["http://127.0.0.1:1" + "0" * 400], pieces=1, complete=True
    )
    for number in range(200):  # more than fits beside what is there
        agent.known.swarm(f"{number:064}", [peer])
    await until(lambda: "not kept for an outage: No space left" in caplog.text)
    source.unlink()
    engine.sharing.group_lost("boats", "a test says so" + " and so" * 20_000)
    await until(lambda: "not noted of boats/hull.bin: No space left" in caplog.text)
    assert agent.known.changed
    assert not [task for task in agent._tasks if task.done()]
    full(records, False)
    await until(lambda: f"{199:064}".encode() in (records.setting("known") or b""))
    assert "never retrieved" not in caplog.text and "Traceback" not in caplog.text


async def test_one_process_per_home(peers: Peers) -> None:
    home = Home(peers.folder / "ben")
    home.lock()
    other = Home(peers.folder / "ben")
    with pytest.raises(TrimaranError) as refused:
        other.lock()
    assert str(os.getpid()) in refused.value.message
    home.unlock()
    other.lock()
    other.unlock()
    Records(home.state_file).close()
