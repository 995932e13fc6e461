"""What is kept on the disk: piece maps, parts, hashing, records."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import full
from hypothesis import given
from hypothesis import strategies as st

from peer import piecemap
from peer.buffers import BufferPool
from peer.content import Content, OpenFiles, SourceGoneError, open_below
from peer.hashing import ChangedError, Hashing, look, scan
from peer.home import Home, SocketPath, write_whole
from peer.manifest import FileEntry, Layout, Manifest
from peer.piecemap import PieceMap, PieceMapDamagedError
from peer.records import Print, Record, Records
from peer.reports import Exit, State, TrimaranError
from peer.reuse import Here, candidates, copy_what_is_here
from peer.store import PartStore, rename_new, same_content


async def manifest_of(path: Path) -> Manifest:
    with ThreadPoolExecutor(2) as executor:
        return await Hashing(scan(path, "sha256"), 2).run(executor)


# --- piece maps -----------------------------------------------------------------------------------


@given(
    pieces=st.integers(1, 70),
    steps=st.lists(
        st.tuples(st.sampled_from(["wrote", "lost", "sync", "kill", "power"]), st.integers(0, 69))
    ),
)
def test_a_piece_map_against_sets(
    tmp_path_factory: pytest.TempPathFactory, pieces: int, steps: list[tuple[str, int]]
) -> None:
    """`kill -9` forgets nothing that was written; a power failure nothing that was synced."""
    path = tmp_path_factory.mktemp("maps") / "map"
    boots = iter(f"boot-{number}" for number in range(1000))
    boot = next(boots)
    real = piecemap.boot_id
    piecemap.boot_id = lambda: boot
    try:
        tested = PieceMap.create(path, pieces, [1, 2, 3])
        written: set[int] = set()
        synced: set[int] = set()
        for step, number in steps:
            index = number % pieces
            if step == "wrote":
                tested.wrote(index)
                written.add(index)
            elif step == "lost":
                tested.lost(index)
                written.discard(index)
                synced.discard(index)
            elif step == "sync":
                tested.sync(lambda: None)
                synced = set(written)
            else:
                if step == "power":
                    boot = next(boots)
                    written = set(synced)
                tested.close()
                tested = PieceMap.load(path)
            assert {each for each in range(pieces) if tested.has(each)} == written
            assert tested.unsynced_pieces >= len(written - synced)
        assert tested.inodes == (1, 2, 3)
        tested.close()
    finally:
        piecemap.boot_id = real


def test_a_damaged_piece_map_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "map"
    PieceMap.create(path, 100, [7]).close()
    whole = path.read_bytes()
    for bad in (
        b"",
        whole[:20],
        whole[:-1],
        whole + b"x",
        b"x" + whole[1:],
        whole[:50] + b"\x01" + whole[51:],
    ):
        path.write_bytes(bad)
        with pytest.raises(PieceMapDamagedError):
            PieceMap.load(path)


def test_data_that_could_not_be_synced_is_not_called_synced(tmp_path: Path) -> None:
    tested = PieceMap.create(tmp_path / "map", 8, [1])
    tested.wrote(3)

    def fails() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError):
        tested.sync(fails)
    assert tested.unsynced_pieces == 1
    assert (tmp_path / "map").read_bytes()[-1] == 0
    tested.close()


# --- hashing ----------------------------------------------------------------------------------------


async def test_hashes_are_those_of_the_concatenation(tmp_path: Path) -> None:
    root = tmp_path / "boat"
    root.mkdir()
    contents = {f"{number:02}": os.urandom(number * 40_000) for number in range(12)}
    for name, content in contents.items():
        (root / name).write_bytes(content)
    manifest = await manifest_of(root)
    whole = b"".join(contents[name] for name in sorted(contents))
    size = manifest.layout.piece_bytes
    expected = [hashlib.sha256(whole[at : at + size]).digest() for at in range(0, len(whole), size)]
    assert [manifest.digest(index) for index in range(manifest.pieces)] == expected


async def test_a_source_that_changes_while_it_is_hashed(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(1 << 20))
    found = scan(source, "sha256")
    with source.open("ab") as file:
        file.write(b"more")
    with ThreadPoolExecutor(2) as executor, pytest.raises(ChangedError):
        await Hashing(found, 2).run(executor)
    same, reason = look(source, found.layout, found.prints)
    assert not same
    assert "changed" in reason


def test_links_and_special_files(tmp_path: Path) -> None:
    root = tmp_path / "boat"
    (root / "in").mkdir(parents=True)
    (root / "in/file").write_bytes(b"inside")
    (root / "inner").symlink_to("in/file")
    assert [entry.path for entry in scan(root, "sha256").layout.files] == ["in/file", "inner"]
    assert scan(root, "sha256").prints[1].size_bytes == 6

    secret = tmp_path / "secret"
    secret.write_bytes(b"mine")
    secret.chmod(0o600)
    refused = {
        "secret": lambda at: at.symlink_to(secret),
        "nowhere": lambda at: at.symlink_to("missing"),
        "loop": lambda at: at.symlink_to("loop"),
        "folder": lambda at: at.symlink_to(root / "in"),
        "pipe": lambda at: os.mkfifo(at),
        "bad\\name": lambda at: at.write_bytes(b""),
        "nul.txt": lambda at: at.write_bytes(b""),
        "IN": lambda at: at.mkdir(),
    }
    for name, make in refused.items():
        at = root / name
        make(at)
        if name == "IN":
            (at / "x").write_bytes(b"")
        with pytest.raises(TrimaranError) as error:
            scan(root, "sha256")
        assert error.value.exit_code is Exit.USAGE, name
        if name == "IN":
            (at / "x").unlink()
            at.rmdir()
        else:
            at.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(root)  # the path of a socket is short
        try:
            bound.bind("sock")
        finally:
            os.chdir(here)
        with pytest.raises(TrimaranError):
            scan(root, "sha256")


# --- parts ------------------------------------------------------------------------------------------


async def test_a_wrong_piece_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(600_000))
    manifest = await manifest_of(source)
    (tmp_path / "maps").mkdir()
    store = PartStore.create(manifest, tmp_path / "out/file", tmp_path / "maps")
    before = store.part.read_bytes()
    assert not store.check_and_write(1, memoryview(b"x" * manifest.layout.piece_length(1)))
    assert store.part.read_bytes() == before
    assert not store.map.has(1)
    for index in (2, 0, 1, 1):
        start = index * manifest.layout.piece_bytes
        piece = source.read_bytes()[start : start + manifest.layout.piece_length(index)]
        assert store.check_and_write(index, memoryview(piece))
    assert not (tmp_path / "out/file").exists()
    store.finish()
    assert (tmp_path / "out/file").read_bytes() == source.read_bytes()
    store.discard()
    assert (tmp_path / "out/file").exists()


async def test_finishing_never_replaces_anything(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(1000))
    manifest = await manifest_of(source)
    (tmp_path / "maps").mkdir()
    target = tmp_path / "out/file"
    store = PartStore.create(manifest, target, tmp_path / "maps")
    assert store.check_and_write(0, memoryview(source.read_bytes()))
    target.write_bytes(b"somebody else's")
    with pytest.raises(TrimaranError) as refused:
        store.finish()
    assert refused.value.exit_code is Exit.CONFLICT
    assert target.read_bytes() == b"somebody else's"
    target.write_bytes(source.read_bytes())
    assert store.finish()[0].size_bytes == 1000
    assert list((tmp_path / "out").iterdir()) == [target]


async def test_same_content_looks_at_everything(tmp_path: Path) -> None:
    root = tmp_path / "boat"
    (root / "hollow").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    manifest = await manifest_of(root)
    assert same_content(root, manifest) is not None
    (root / "more").write_bytes(b"")
    assert same_content(root, manifest) is None
    (root / "more").unlink()
    (root / "hollow").rmdir()
    assert same_content(root, manifest) is None
    (root / "hollow").mkdir()
    (root / "file").write_bytes(b"c0ntent")
    assert same_content(root, manifest) is None
    (root / "file").write_bytes(b"content")
    assert same_content(root, manifest) is not None
    (tmp_path / "link").symlink_to(root)
    assert same_content(tmp_path / "link", manifest) is None


async def test_pieces_that_are_here_are_copied(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for root in (old, new):
        root.mkdir()
    for number in range(6):
        content = os.urandom(400_000)
        (old / f"{number}").write_bytes(content)
        (new / f"{number}").write_bytes(b"longer" + content if number == 2 else content)
    before, after = await manifest_of(old), await manifest_of(new)
    (tmp_path / "maps").mkdir()
    store = PartStore.create(after, tmp_path / "out", tmp_path / "maps")
    content = Content(old, before.layout, scan(old, "sha256").prints)
    found: list[int] = []
    copied = copy_what_is_here(store, [Here(before, content, version=True)], found.append, lambda: False)
    assert copied >= after.size_bytes - 3 * after.layout.piece_bytes
    assert store.verify() == []
    stranger = [index for index, _, _ in candidates(after, [Here(before, content, version=False)])]
    assert set(stranger) < set(found)
    store.discard()
    assert not store.part.exists()


def test_nothing_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"x")
    (tmp_path / "part/folder").symlink_to(tmp_path / "outside")
    (tmp_path / "part/file").symlink_to(tmp_path / "outside/file")
    root = os.open(tmp_path / "part", os.O_RDONLY | os.O_DIRECTORY)
    for path in ("folder/file", "file", "folder/new"):
        with pytest.raises(OSError):
            open_below(root, path, os.O_RDWR | os.O_CREAT, make_folders=True)
    os.close(root)
    assert (tmp_path / "outside/file").read_bytes() == b"x"
    assert len(list((tmp_path / "outside").iterdir())) == 1


def test_rename_new_refuses_an_existing_name(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        source, target = tmp_path / f"{kind}-source", tmp_path / f"{kind}-target"
        if kind == "file":
            source.write_bytes(b"new")
            target.write_bytes(b"old")
        else:
            source.mkdir()
            target.mkdir()
        with pytest.raises(FileExistsError):
            rename_new(source, target)
        assert source.exists()


# --- open files ---------------------------------------------------------------------------------------


def test_few_of_many_files_are_open(tmp_path: Path) -> None:
    entries = []
    for number in range(50):
        (tmp_path / f"{number:02}").write_bytes(b"x" * 10)
        entries.append(FileEntry(f"{number:02}", 10))
    layout = Layout.of("folder", "sha256", entries)
    content = Content(tmp_path, layout, scan(tmp_path, "sha256").prints)
    files = OpenFiles(limit=5)
    with files.use(content, 0) as first:
        for number in range(50):
            with files.use(content, number) as descriptor:
                assert os.pread(descriptor, 10, 0) == b"x" * 10
            assert len(files) <= 6
        assert os.pread(first, 10, 0) == b"x" * 10  # in use: not closed, whatever else was opened
    (tmp_path / "03").unlink()
    files.forget(content)
    with pytest.raises(SourceGoneError), files.use(content, 3):
        pass
    (tmp_path / "04").write_bytes(b"y" * 10)
    with pytest.raises(SourceGoneError), files.use(content, 4):
        pass
    files.close()


# --- memory -------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([1, 3, 8, 20]))))
def test_buffers_never_pass_their_bound(steps: list[tuple[bool, int]]) -> None:
    pool = BufferPool(16)
    out: list[bytearray] = []
    for take, size in steps:
        if take:
            buffer = pool.take(size)
            if buffer is not None:
                assert len(buffer) == size
                out.append(buffer)
            else:
                assert out, "a lone request is always granted"
        elif out:
            pool.give(out.pop(0))
        used = sum(len(each) for each in out)
        assert used == pool.out_bytes
        assert used <= 16 or len(out) == 1


# --- home and records ---------------------------------------------------------------------------------


def test_records_come_back(tmp_path: Path) -> None:
    record = Record(
        group="g", name="n", manifest_id="m" * 64, user="u", origin="get", kind="file", path="/x", size_bytes=5,
        state=State.DOWNLOADING, part="/p", map="/m",
    )  # fmt: skip
    records = Records(tmp_path / "state.db")
    records.put(record)
    records.put_prints("/x", "m" * 64, [Print(1, 2, 3)])
    records.put_pending("publish/g/n", "key", b"body")
    records.close()
    records = Records(tmp_path / "state.db")
    assert records.all() == [record]
    assert records.prints("/x") == ("m" * 64, [Print(1, 2, 3)])
    assert records.pending("publish/g/n") == ("key", b"body")
    records.settle("publish/g/n")
    assert records.pending("publish/g/n") is None
    records.delete(record)
    assert records.all() == []
    records.close()
    (tmp_path / "bad.db").write_bytes(b"not a database, whatever its name says" * 100)
    with pytest.raises(TrimaranError) as refused:
        Records(tmp_path / "bad.db")
    assert "bad.db" in refused.value.message


def test_records_on_a_full_disk_say_so_and_go_on_when_there_is_room(tmp_path: Path) -> None:
    records = Records(tmp_path / "state.db")
    full(records, True)
    for write in (
        lambda: records.put_setting("known", bytes(100_000)),
        lambda: records.put_pending("publish/g/n", "key", bytes(100_000)),
    ):
        with pytest.raises(OSError, match="No space left") as refused:
            write()
        assert refused.value.errno == errno.ENOSPC
    assert records.setting("known") is None
    full(records, False)
    records.put_setting("known", bytes(100_000))
    assert records.setting("known") == bytes(100_000)
    records.close()


def test_a_file_is_replaced_whole_or_not(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"old", mode=0o600)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_socket_in_a_long_home(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 120))
    short = SocketPath(home.socket)
    assert len(short.path) < 100
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(short.path)
    assert home.socket.is_socket()
    short.close()
