"""Manifests: named by content alone, and refused with the path's name when they are hostile."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.manifest import (
    DIGEST_BYTES,
    GIB,
    KIB,
    MIB,
    NEAR_BYTES,
    PIECES_MAX,
    SIZE_BYTES_MAX,
    FileEntry,
    Layout,
    Manifest,
    ManifestError,
    piece_bytes_for,
    piece_digest,
)


def folder(*files: tuple[str, int], empty: tuple[str, ...] = ()) -> Manifest:
    layout = Layout.of("folder", "sha256", [FileEntry(path, size) for path, size in files], empty)
    return layout.with_hashes(b"h" * DIGEST_BYTES * layout.pieces)


def forged(**changes: object) -> bytes:
    """The bytes of a manifest with some fields replaced, unchecked."""
    fields: dict[str, object] = {
        "version": 1,
        "kind": "folder",
        "algorithm": "sha256",
        "piece_bytes": 256 * KIB,
        "files": [["a", 5, False]],
        "empty_folders": [],
        "hashes": b"h" * 32,
    }
    return msgspec.msgpack.encode(list((fields | changes).values()))


@pytest.mark.parametrize(
    ("size_bytes", "piece_bytes"),
    [
        (0, 256 * KIB),
        (32 * MIB, 256 * KIB),
        (128 * MIB, 256 * KIB),
        (128 * MIB + 1, 512 * KIB),
        (256 * MIB, 1 * MIB),
        (512 * MIB, 2 * MIB),
        (1 * GIB, 4 * MIB),
        (512 * GIB, 4 * MIB),
        (1024 * GIB, 8 * MIB),
        (SIZE_BYTES_MAX, 32 * MIB),
    ],
)
def test_the_piece_size_follows_from_the_total_size(size_bytes: int, piece_bytes: int) -> None:
    assert piece_bytes_for(size_bytes) == piece_bytes
    assert -(-size_bytes // piece_bytes) <= PIECES_MAX


@pytest.mark.parametrize(
    "size_bytes", [0, 1, NEAR_BYTES - 1, NEAR_BYTES, NEAR_BYTES + 1, 2 * NEAR_BYTES, 3 * NEAR_BYTES - 7]
)
def test_a_piece_is_hashed_as_a_whole_however_it_is_read(size_bytes: int) -> None:
    piece = bytes(number % 251 for number in range(size_bytes))
    hash_of = piece_digest("sha256")
    assert hash_of(piece) == hashlib.sha256(piece).digest()
    assert hash_of(memoryview(bytearray(piece))) == hashlib.sha256(piece).digest()


def test_one_tebibyte_has_a_manifest_of_four_mebibytes() -> None:
    layout = Layout.of("file", "sha256", [FileEntry("", 1024 * GIB)])
    manifest = layout.with_hashes(bytes(DIGEST_BYTES * layout.pieces))
    assert layout.pieces == 131_072
    assert len(manifest.encode()) < 4 * MIB + 100
    assert Manifest.decode(manifest.encode(), manifest.id).size_bytes == 1024 * GIB


def test_the_id_is_the_hash_of_the_bytes_and_depends_on_content_alone() -> None:
    one = folder(("b/ü.txt", 7), ("a", 0), empty=("z", "y"))
    two = folder(("a", 0), ("b/ü.txt", 7), empty=("y", "z"))
    assert one.id == two.id == hashlib.sha256(one.encode()).hexdigest()
    assert one.id != folder(("a", 0), ("b/ü.txt", 7), empty=("y",)).id
    executable = Layout.of("folder", "sha256", [FileEntry("a", 0, True)]).with_hashes(b"")
    assert executable.id != folder(("a", 0)).id


names = st.text(st.characters(codec="utf-8", exclude_characters='/\\.: "'), min_size=1, max_size=8)


@given(
    st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), st.integers(0, MIB), max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_what_is_encoded_is_decoded(files: dict[str, int], executable: list[bool]) -> None:
    entries = [
        FileEntry(path, size, bit) for (path, size), bit in zip(files.items(), executable, strict=False)
    ]
    try:
        layout = Layout.of("folder", "blake3", entries)
    except ManifestError:
        return  # names that collide, or that are refused
    manifest = layout.with_hashes(bytes(range(32)) * layout.pieces)
    again = Manifest.decode(manifest.encode(), manifest.id)
    assert again.layout.files == layout.files
    assert again.id == manifest.id
    assert again.encode() == manifest.encode()


@given(st.lists(st.sampled_from([0, 0, 1, 5, 100_000, 262_143, 262_144, 262_145, 700_000]), max_size=12))
def test_spans_cover_every_byte_once_and_in_order(sizes: list[int]) -> None:
    layout = Layout.of("folder", "sha256", [FileEntry(f"f{i:02}", size) for i, size in enumerate(sizes)])
    naive = [(file, offset) for file, size in enumerate(sizes) for offset in range(0, size, 50_000)]
    starts = {}
    position = 0
    for index in range(layout.pieces):
        assert sum(length for _, _, length in layout.spans(index)) == layout.piece_length(index)
        for file, offset, length in layout.spans(index):
            assert length > 0 and offset + length <= sizes[file]
            assert position == layout.file_start(file) + offset
            starts[(file, offset)] = length
            assert index in layout.pieces_of_file(file)
            position += length
    assert position == sum(sizes)
    for file, offset in naive:
        assert any(f == file and o <= offset < o + length for (f, o), length in starts.items())


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "//host/share",
        "C:/windows",
        "c:evil",
        "a\\..\\b",
        "a\0b",
        "a\nb",
        "a\u202etxt.exe",
        ".",
        "./a",
        "a/./b",
        "",
        "a//b",
        "a/",
        "CON",
        "nul.txt",
        "dir/LPT1.log",
        "com¹",
        "x" * 256,
        "x" * 300,
        "ü" * 128,
        "a/" * 600 + "b",
        "a/" * 64 + "b",
        "dot.",
        "space ",
        "dir. /a",
    ],
)
def test_hostile_paths_are_refused_at_share_and_at_download(path: str) -> None:
    with pytest.raises(ManifestError) as refused:
        Layout.of("folder", "sha256", [FileEntry(path, 5)])
    assert refused.value.path == path
    with pytest.raises(ManifestError) as refused:
        Manifest.decode(forged(files=[[path, 5, False]]))
    assert refused.value.path == path
    with pytest.raises(ManifestError):
        Manifest.decode(forged(files=[], hashes=b"", empty_folders=[path]))


@pytest.mark.parametrize(
    "path",
    [
        "ファイル.txt",
        "café",
        "cafe\u0301",
        "naïve/Ωmega",
        "emoji 🐙",
        ".hidden",
        "a b",
        "x" * 255,
        "12:00",
        "..."[:0] + "a..b",
    ],
)
def test_names_in_any_script_are_carried_as_they_are(path: str) -> None:
    manifest = folder((path, 5))
    assert Manifest.decode(manifest.encode()).layout.files[0].path == path


@pytest.mark.parametrize(
    ("files", "empty"),
    [
        (["a", "a"], []),
        (["A", "a"], []),
        (["dir/x", "DIR/y"], []),
        (["é", "e\u0301"], []),
        (["ß", "ss"], []),
        (["a", "a/b"], []),
        (["a"], ["a"]),
        (["a/b"], ["a"]),
        ([], ["a", "a/b"]),
        (["A/b"], ["a"]),
    ],
)
def test_paths_that_cannot_stand_together_are_refused(files: list[str], empty: list[str]) -> None:
    with pytest.raises(ManifestError) as refused:
        Layout.of("folder", "sha256", [FileEntry(path, 0) for path in files], empty)
    assert refused.value.path is not None
    encoded = forged(
        files=[[path, 0, False] for path in sorted(files)], empty_folders=sorted(empty), hashes=b""
    )
    with pytest.raises(ManifestError):
        Manifest.decode(encoded)


def test_a_name_that_is_not_utf8_is_refused_at_share() -> None:
    with pytest.raises(ManifestError, match="UTF-8"):
        Layout.of("folder", "sha256", [FileEntry("bad\udcff", 5)])


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xc1",
        b"[]",
        b"\x91" * 5000,
        forged()[:-1],
        forged() + b"\0",
        forged(version=2),
        forged(version="1"),
        forged(kind="link"),
        forged(algorithm="md5"),
        forged(piece_bytes=0),
        forged(piece_bytes=1),
        forged(piece_bytes=512 * KIB),
        forged(piece_bytes=1 << 62),
        forged(files=[["a", -5, False]], hashes=b""),
        forged(files=[["a", 1 << 62, False]]),
        forged(files=[["a", (1 << 63) - 1, False], ["b", (1 << 63) - 1, False]]),
        forged(files=[["a", 5]]),
        forged(files=[["a", 5, False, 1]]),
        forged(files=[[b"a", 5, False]]),
        forged(files=[["a", 5, 1]]),
        forged(files=[["b", 1, False], ["a", 4, False]]),
        forged(hashes=b""),
        forged(hashes=b"h" * 31),
        forged(hashes=b"h" * 64),
        forged(kind="file"),
        forged(kind="file", files=[["", 2, False], ["", 3, False]]),
        forged(kind="file", files=[["", 5, False]], empty_folders=["a"]),
        forged(kind="file", files=[], hashes=b""),
        forged(files=[[f"f{i:06}", 0, False] for i in range(200_001)], hashes=b""),
        # the same content in another encoding: a five as a 64-bit number
        forged().replace(b"\xa1a\x05", b"\xa1a\xcf" + (5).to_bytes(8, "big")),
    ],
)
def test_whatever_is_not_a_manifest_is_refused(encoded: bytes) -> None:
    Manifest.decode(forged())  # the unforged one is fine
    with pytest.raises(ManifestError):
        Manifest.decode(encoded)


@given(st.binary(max_size=200))
def test_noise_is_refused_without_a_traceback(noise: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.decode(noise)


def test_other_bytes_than_the_id_says_are_refused() -> None:
    manifest = folder(("a", 5))
    with pytest.raises(ManifestError, match="not of"):
        Manifest.decode(manifest.encode(), "0" * 64)


def test_facts_of_the_group_must_agree() -> None:
    manifest = folder(("a", 300_000))
    facts = {
        "kind": "folder",
        "size_bytes": 300_000,
        "pieces": 2,
        "piece_bytes": 256 * KIB,
        "algorithm": "sha256",
    }
    manifest.check_facts(**facts)  # type: ignore[arg-type]
    for name, other in (
        ("kind", "file"),
        ("size_bytes", 1),
        ("pieces", 3),
        ("piece_bytes", 1),
        ("algorithm", "blake3"),
    ):
        with pytest.raises(ManifestError):
            manifest.check_facts(**(facts | {name: other}))  # type: ignore[arg-type]
