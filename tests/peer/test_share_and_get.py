"""Files and folders go from peer to peer, whole."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from conftest import Peers, get, ignore, share

from peer.reports import Exit, State, TrimaranError


def some_file(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))
    return path


async def test_a_file_from_one_to_one(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 5_000_001)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    shared = await share(ada, source)
    assert (shared.size_bytes, shared.pieces) == (5_000_001, 20)
    report = await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert report.verified
    assert report.received_bytes == 5_000_001
    assert report.reused_bytes == 0
    assert [(each.bytes, each.pieces, each.user) for each in report.sources] == [(5_000_001, 20, "ada")]
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there/hull.bin"]
    assert [(row.state, row.done_bytes) for row in await ben.ps()] == [(State.COMPLETE, 5_000_001)]


async def test_getting_again_is_done_at_once_and_other_content_is_a_conflict(
    peers: Peers, tmp_path: Path
) -> None:
    source = some_file(tmp_path / "hull.bin", 600_000)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    await get(ben, "hull.bin", tmp_path / "there")
    again = await get(ben, "hull.bin", tmp_path / "there")
    assert (again.received_bytes, again.reused_bytes) == (0, 600_000)
    some_file(tmp_path / "elsewhere/hull.bin", 600_000)
    with pytest.raises(TrimaranError) as refused:
        await get(ben, "hull.bin", tmp_path / "elsewhere")
    assert refused.value.exit_code is Exit.CONFLICT
    copy = tmp_path / "copy/hull.bin"
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    assert (await get(ben, "hull.bin", tmp_path / "copy")).received_bytes == 0


async def test_a_folder_with_everything_in_it(peers: Peers, tmp_path: Path) -> None:
    root = tmp_path / "boat"
    some_file(root / "deck/план.txt", 300_000)
    some_file(root / "deck/船.bin", 70_000)
    (root / "deck/empty").write_bytes(b"")
    (root / "hold/hollow").mkdir(parents=True)
    some_file(root / "run.sh", 10).chmod(0o755)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, root)
    await get(ben, "boat", tmp_path / "there")
    there = tmp_path / "there/boat"
    found = sorted(str(path.relative_to(there)) for path in there.rglob("*"))
    assert found == sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    for path in root.rglob("*"):
        other = there / path.relative_to(root)
        assert other.is_dir() == path.is_dir()
        if path.is_file():
            assert other.read_bytes() == path.read_bytes()
            assert bool(other.stat().st_mode & 0o100) == bool(path.stat().st_mode & 0o100)


async def test_an_empty_file_and_an_empty_folder(peers: Peers, tmp_path: Path) -> None:
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "hollow").mkdir()
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, tmp_path / "nothing")
    await share(ada, tmp_path / "hollow")
    await get(ben, "nothing", tmp_path / "there")
    await get(ben, "hollow", tmp_path / "there")
    assert (tmp_path / "there/nothing").read_bytes() == b""
    assert list((tmp_path / "there/hollow").iterdir()) == []


async def test_thousands_of_small_files(peers: Peers, tmp_path: Path) -> None:
    root = tmp_path / "many"
    for number in range(3000):
        some_file(root / f"{number % 50}/{number}.bin", 1 + number % 4000)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, root)
    await get(ben, "many", tmp_path / "there")
    for path in root.rglob("*.bin"):
        assert (tmp_path / "there/many" / path.relative_to(root)).read_bytes() == path.read_bytes()


async def test_two_seeders_both_contribute(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 30_000_000)
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b/hull.bin"
    twin.write_bytes(source.read_bytes())
    ada, ben, cleo = await peers.open("ada"), await peers.open("ben"), await peers.open("cleo")
    await share(ada, source)
    await share(ben, twin)
    report = await get(cleo, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    assert len(report.sources) == 2
    assert all(each.bytes >= 0.3 * 30_000_000 for each in report.sources), report.sources


async def test_downloaders_give_to_each_other(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 16 << 20)
    ada = await peers.open("ada", up_bytes_per_second=8 << 20)
    others = [await peers.open(user) for user in ("ben", "cleo", "dora")]
    await share(ada, source)
    reports = await asyncio.gather(
        *(get(each, "hull.bin", tmp_path / f"there{number}") for number, each in enumerate(others))
    )
    for number in range(3):
        assert (tmp_path / f"there{number}/hull.bin").read_bytes() == source.read_bytes()
    seeder = (await ada.whoami()).peer_id
    from_seeder = sum(each.bytes for report in reports for each in report.sources if each.peer_id == seeder)
    assert from_seeder < 0.6 * 3 * (16 << 20)


async def test_a_new_version_moves_only_what_changed(peers: Peers, tmp_path: Path) -> None:
    root = tmp_path / "boat"
    for number in range(20):
        some_file(root / f"{number:02}.bin", 500_000)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, root)
    await get(ben, "boat", tmp_path / "one")
    with (root / "03.bin").open("ab") as file:
        file.write(b"longer: all that follows is cut otherwise")
    await share(ada, root, replace=True)
    report = await get(ben, "boat", tmp_path / "two")
    assert (tmp_path / "two/boat/19.bin").read_bytes() == (root / "19.bin").read_bytes()
    assert (tmp_path / "two/boat/03.bin").read_bytes() == (root / "03.bin").read_bytes()
    assert report.received_bytes <= 2 * (256 << 10)


async def test_a_restarted_peer_shares_again_without_reading(peers: Peers, tmp_path: Path) -> None:
    kept, edited = some_file(tmp_path / "kept.bin", 900_000), some_file(tmp_path / "edited.bin", 900_000)
    gone = some_file(tmp_path / "gone.bin", 900_000)
    ada = await peers.open("ada")
    for path in (kept, edited, gone):
        await share(ada, path)
    await peers.close(ada)
    edited.write_bytes(os.urandom(900_000))
    gone.unlink()
    ada = await peers.open("ada")
    serving = asyncio.create_task(ada.serve_forever())
    ben = await peers.open("ben")
    assert (await get(ben, "kept.bin", tmp_path / "there")).received_bytes == 900_000
    states = {row.name: row.state for row in await ada.ps()}
    assert states == {"kept.bin": State.COMPLETE, "edited.bin": State.CHANGED, "gone.bin": State.MISSING}
    for name in ("edited.bin", "gone.bin"):
        swarm = await peers.trackers.call("GET", f"/v1/groups/boats/files/{name}/swarm", session=peers.owner)
        assert swarm.json["peers"] == []
    serving.cancel()


async def test_a_source_edited_while_it_is_shared_is_withdrawn(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 900_000)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    source.write_bytes(os.urandom(900_000))
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))
    states: list[State] = []

    async def look() -> None:
        states[:] = [row.state for row in await ada.ps()]

    async with asyncio.timeout(10):
        while states != [State.CHANGED]:
            await look()
            await asyncio.sleep(0.02)
    assert not (tmp_path / "there/hull.bin").exists()
    getting.cancel()
    await asyncio.gather(getting, return_exceptions=True)


async def test_pause_resume_cancel(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 8 << 20)
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", down=1 << 20))
    rows = []

    async def row() -> None:
        rows[:] = await ben.ps()

    async with asyncio.timeout(10):
        while not rows or not rows[0].done_bytes:
            await row()
            await asyncio.sleep(0.02)
    await ben.pause("boats", "hull.bin")
    with pytest.raises(TrimaranError) as ended:
        await getting
    assert ended.value.exit_code is Exit.UNFINISHED
    await row()
    assert rows[0].state is State.PAUSED
    assert 0 < rows[0].done_bytes < 8 << 20
    report = await get(ben, "hull.bin", tmp_path / "there")
    assert report.received_bytes + rows[0].done_bytes == 8 << 20
    other = asyncio.create_task(get(ben, "hull.bin", tmp_path / "again", down=1 << 20))
    await asyncio.gather(other, return_exceptions=True)


async def test_what_cannot_be_shared_is_refused(peers: Peers, tmp_path: Path) -> None:
    ada = await peers.open("ada")
    root = tmp_path / "bad"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrimaranError) as refused:
        await share(ada, root)
    assert refused.value.exit_code is Exit.USAGE
    assert "nowhere" in refused.value.message
    with pytest.raises(TrimaranError) as missing:
        await share(ada, tmp_path / "not there")
    assert missing.value.exit_code is Exit.NOT_FOUND
    with pytest.raises(TrimaranError) as stranger:
        await ada.share(root, "other group", None, replace=False, algorithm=None, on_progress=ignore)
    assert stranger.value.exit_code is Exit.DENIED


async def test_unshare_stops_this_peer(peers: Peers, tmp_path: Path) -> None:
    source = some_file(tmp_path / "hull.bin", 900_000)
    ada = await peers.open("ada")
    await share(ada, source)
    await ada.unshare("boats", "hull.bin")
    swarm = await peers.trackers.call("GET", "/v1/groups/boats/files/hull.bin/swarm", session=peers.owner)
    assert swarm.json["peers"] == []
    assert source.exists()
    assert await ada.ps() == []
    with pytest.raises(TrimaranError) as refused:
        await ada.unshare("boats", "hull.bin")
    assert refused.value.exit_code is Exit.NOT_FOUND
