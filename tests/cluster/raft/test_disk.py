"""The real disk, the real sync thread, and the real process that dies at every step of them."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import disk_life
import pytest

from cluster.consensus import ConsensusStartError
from cluster.raft.disk import DiskFullError, FolderDisk, ThreadSyncer
from cluster.raft.journal import Journal
from cluster.raft.journal_format import Identity
from cluster.raft.kill_points import EXIT_STATUS, VARIABLE, KillPoints, area_of, kill_point_names
from cluster.raft.runtime import AsyncioRuntime
from cluster.raft.snapshots import SnapshotStore

IDENTITY = Identity("n1", "c1")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FolderDisk]:
    made = FolderDisk(tmp_path / "data")
    yield made
    made.close()


def test_a_file_is_appended_read_and_cut(disk: FolderDisk) -> None:
    file = disk.open_append("journal-000000000001.log")
    file.append(b"one")
    file.append(bytearray(b"two"))
    file.sync()
    assert (file.size(), file.read_at(2, 10), file.read_at(9, 1)) == (6, b"etwo", b"")
    file.truncate(4)
    file.append(b"!")
    file.close()
    file.close()
    disk.sync_folder()
    again = disk.open_read("journal-000000000001.log")
    assert again.read_at(0, again.size()) == b"onet!"
    again.close()
    disk.rename("journal-000000000001.log", "other")
    assert "other" in disk.list()
    disk.remove("other")
    assert "other" not in disk.list()
    with pytest.raises(FileNotFoundError):
        disk.open_read("other")


def test_the_folder_is_private(disk: FolderDisk) -> None:
    disk.open_append("x").close()
    assert disk.folder.stat().st_mode & 0o77 == 0
    assert (disk.folder / "x").stat().st_mode & 0o77 == 0


def test_a_second_process_is_refused(disk: FolderDisk) -> None:
    script = "import sys\nfrom pathlib import Path\nfrom cluster.raft.disk import FolderDisk\nFolderDisk(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(disk.folder)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode != 0
    assert "in use by another process" in second.stderr
    disk.close()
    assert subprocess.run(command, timeout=60).returncode == 0


def test_an_unusable_folder_is_a_clear_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsensusStartError, match="cannot be used"):
        FolderDisk(tmp_path / "file")


def test_no_room_leaves_nothing_of_the_write(disk: FolderDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    file = disk.open_append("journal-000000000001.log")
    file.append(b"kept")
    write = os.write

    def short(descriptor: int, data: memoryview) -> int:
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:30])

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(DiskFullError):
        file.append(bytes(100))
    monkeypatch.undo()
    assert file.size() == (disk.folder / "journal-000000000001.log").stat().st_size == 4
    file.append(b"!")
    assert file.read_at(0, 9) == b"kept!"


def test_another_failure_is_not_want_of_room(disk: FolderDisk) -> None:
    file = disk.open_append("journal-000000000001.log")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError) as caught:
            file.append(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not isinstance(caught.value, DiskFullError)
    assert file.size() == (disk.folder / "journal-000000000001.log").stat().st_size == 0


async def test_the_sync_thread_keeps_the_order_and_reports_on_the_loop() -> None:
    loop = asyncio.get_running_loop()
    syncer = ThreadSyncer(loop.call_soon_threadsafe)
    here = threading.get_ident()
    done: list[tuple[int, OSError | None]] = []
    finished = loop.create_future()

    def work(number: int) -> None:
        assert threading.get_ident() != here
        if number == 3:
            raise DiskFullError(errno.ENOSPC, "full")
        if number == 5:
            raise ZeroDivisionError("a defect")

    def report(number: int, outcome: OSError | None) -> None:
        assert threading.get_ident() == here
        done.append((number, outcome))
        if number == 9:
            finished.set_result(None)

    for number in range(10):
        syncer.submit(
            lambda number=number: work(number),  # type: ignore[misc]
            lambda outcome, number=number: report(number, outcome),  # type: ignore[misc]
        )
    await asyncio.wait_for(finished, 10)
    syncer.close()
    assert [number for number, _ in done] == list(range(10))
    outcomes = {number: outcome for number, outcome in done if outcome is not None}
    assert set(outcomes) == {3, 5}
    assert isinstance(outcomes[3], DiskFullError)
    assert "a defect" in str(outcomes[5])


async def test_a_journal_and_a_snapshot_on_the_real_disk(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    for life in range(3):
        disk = FolderDisk(tmp_path)
        syncer = ThreadSyncer(loop.call_soon_threadsafe)
        runtime = AsyncioRuntime(syncer)
        fatal: list[str] = []
        journal = Journal.open(
            disk, runtime, identity=IDENTITY, create=life == 0, segment_bytes=2000, on_fatal=fatal.append
        )
        store = SnapshotStore.open(disk, runtime, cluster_id="c1")
        assert len(journal) == life * 100
        journal.setCurrentTerm(life + 1, "n1")
        for index in range(life * 100 + 1, life * 100 + 101):
            journal.add(b"command %d" % index, index, life + 1)
            journal.flush()
        synced: asyncio.Future[None] = loop.create_future()
        journal.when_synced(journal.written, lambda synced=synced: synced.set_result(None))  # type: ignore[misc]
        await asyncio.wait_for(synced, 10)
        written: asyncio.Future[OSError | None] = loop.create_future()
        writer = store.writer(journal.last_index, life + 1, b"config")
        writer.feed(bytes(3_000_000))
        writer.finish(written.set_result)
        assert await asyncio.wait_for(written, 30) is None
        meta = store.latest()
        assert meta is not None
        assert (meta.index, meta.size_bytes) == (life * 100 + 100, 3_000_000)
        assert store.read(2_999_990, 100) == bytes(10)
        journal.close()
        store.close()
        await loop.run_in_executor(None, syncer.close)
        disk.close()
        assert not fatal


async def test_out_of_descriptors_a_new_segment_waits_for_one(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    disk = FolderDisk(tmp_path)
    syncer = ThreadSyncer(loop.call_soon_threadsafe)
    fatal: list[str] = []
    full: asyncio.Queue[bool] = asyncio.Queue()
    journal = Journal.open(
        disk, AsyncioRuntime(syncer), identity=IDENTITY, create=True, segment_bytes=2000, on_fatal=fatal.append,
        on_disk_full=full.put_nowait,
    )  # fmt: skip
    journal.setCurrentTerm(1, "n1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for index, size in ((1, 3000), (2, 10)):  # the second begins a new segment
            journal.add(bytes(size), index, 1)
            journal.flush()
        assert await asyncio.wait_for(full.get(), 10) is True
        with pytest.raises(DiskFullError):
            journal.add(b"no", 3, 1)
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    journal.onOneSecondTimer()
    assert await asyncio.wait_for(full.get(), 10) is False
    synced: asyncio.Future[None] = loop.create_future()
    journal.when_synced(journal.written, lambda: synced.set_result(None))
    await asyncio.wait_for(synced, 10)
    assert not fatal
    journal.close()
    await loop.run_in_executor(None, syncer.close)
    disk.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes that need not import everything anew."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        # 3.11's fork server looks for what it is to preload on the environment's path only.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        context.set_forkserver_preload(["disk_life"])
        yield context


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """In memory where there is such a place: a kill leaves there what it leaves elsewhere, and syncs are free."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def live(
    processes: ForkServerContext, folder: Path, point: str, rounds: int
) -> tuple[int | None, list[tuple[int, int]], tuple[int, int]]:
    """(exit status, what it said was synced, what it had found at its start), as (index, term)."""
    output = folder.with_suffix(".txt")
    process = processes.Process(target=disk_life.run, args=(folder, output, point, rounds))
    process.start()
    process.join(60)
    assert process.exitcode in (0, EXIT_STATUS), "it failed: see its output"
    said = output.read_text()
    assert "fatal" not in said
    synced = [(int(a), int(b)) for a, b in re.findall(r"synced (\d+) (\d+)", said)]
    found = [(int(a), int(b)) for a, b in re.findall(r"found (\d+) (\d+)", said)]
    return process.exitcode, synced, found[0] if found else (0, 0)


@pytest.mark.parametrize("name", kill_point_names())
def test_killed_at_any_step_nothing_synced_is_lost(
    quick_folder: Path, name: str, processes: ForkServerContext
) -> None:
    folder = quick_folder / "data"
    promised = (0, 0)
    died = False
    for nth in (1, 4):
        if name.startswith("journal.truncate"):
            live(processes, folder, "journal.append:5", 9)  # leaves a tail to cut
        status, synced, found = live(processes, folder, f"{name}:{nth}", 9)
        died |= status == EXIT_STATUS
        if status == 0 or found != (0, 0):
            assert found >= promised, "what was promised in an earlier life is gone"
        promised = max([promised, *synced])
    status, _, found = live(processes, folder, "", 1)
    assert status == 0
    assert found[0] >= promised[0]
    assert found[1] >= promised[1]
    assert died, "the kill point was never reached: a test that cannot fail"


@pytest.mark.parametrize("point", ["receive.append:4", "receive.sync.before:4", "receive.append.before:5"])
def test_killed_while_receiving_the_next_life_goes_on(
    quick_folder: Path, point: str, processes: ForkServerContext
) -> None:
    folder = quick_folder / "data"
    assert live(processes, folder, point, 9)[0] == EXIT_STATUS
    assert list(folder.glob("*.part"))
    assert live(processes, folder, "", 1)[0] == 0
    assert "resumed" in folder.with_suffix(".txt").read_text()
    assert not list(folder.glob("*.part"))


def test_every_kill_point_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "reference" / "kill-points.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)\.<step>` \|[^|]*\| ([^|]*) \|", text, re.MULTILINE))
    documented = []
    for area, steps in rows.items():
        for step in re.findall(r"`(\w+)`", steps):
            if step == "append":
                documented.append(f"{area}.append")
            documented += [f"{area}.{step}.before", f"{area}.{step}.after"]
    assert sorted(documented) == sorted(kill_point_names())


def test_a_wrong_kill_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "journal.sink.before")
    with pytest.raises(ConsensusStartError, match=r"no kill point 'journal.sink.before'. The names are in"):
        FolderDisk(tmp_path)
    with pytest.raises(ValueError, match="no kill point"):
        KillPoints.from_environment({VARIABLE: "journal.sink.before"})
    with pytest.raises(ValueError, match="no number"):
        KillPoints.from_environment({VARIABLE: "journal.sync.before:x"})
    assert [area_of(name) for name in ("journal-000000000001.log", "journal.head.tmp", "snapshot-1-1-1.tmp")] == [
        "journal", "head", "snapshot",
    ]  # fmt: skip
