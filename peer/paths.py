"""Which relative paths may stand in a manifest.

Names from the network are hostile: a path that could leave the target folder, name a device, or mean one file here
and another elsewhere is refused, at share and at download alike, and the refusal names the path. Paths are
kept exactly as the sharer wrote them (no normalization): the rules only refuse.

A path is relative, its parts joined by "/", UTF-8. The limits are those of the file systems in use today.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from enum import Enum
from typing import Final

PART_BYTES_MAX: Final = 255  # ext4, xfs, btrfs, zfs; APFS and NTFS allow 255 characters
PATH_BYTES_MAX: Final = 1_024
PATH_DEPTH_MAX: Final = 64

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_DRIVE: Final = re.compile(r"^[A-Za-z]:")
_DEVICE: Final = re.compile(r"^(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])$", re.IGNORECASE)


class PathError(ValueError):
    """A path that Trimaran does not carry. `path` is the path, `reason` a clause that follows its name."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path[:300]!a}: {reason}")
        self.path = path
        self.reason = reason


def check_path(path: str) -> None:
    """Refuse with `PathError` a path that may not stand in a manifest."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise PathError(path, "the name is not valid UTF-8") from None
    if not path:
        raise PathError(path, "a name is empty")
    if path.startswith("/") or _DRIVE.match(path):
        raise PathError(path, "an absolute path")
    if len(encoded) > PATH_BYTES_MAX:
        raise PathError(path, f"a path longer than {PATH_BYTES_MAX} bytes")
    if "\\" in path:
        raise PathError(path, "a backslash in a name")
    if _CONTROL.search(path):
        raise PathError(path, "a control character in a name")
    parts = path.split("/")
    if len(parts) > PATH_DEPTH_MAX:
        raise PathError(path, f"folders nested deeper than {PATH_DEPTH_MAX}")
    for part in parts:
        _check_part(path, part)


def _check_part(path: str, part: str) -> None:
    if not part:
        raise PathError(path, "an empty name between slashes")
    if part in (".", ".."):
        raise PathError(path, f"{part!r} as a name")
    if len(part) * 4 > PART_BYTES_MAX and len(part.encode()) > PART_BYTES_MAX:
        raise PathError(path, f"a name longer than {PART_BYTES_MAX} bytes")
    if part[-1] in ". ":
        raise PathError(path, "a name that ends in a dot or a space")
    stem = part.split(".", 1)[0].rstrip(" ")
    if len(stem) <= 7 and _DEVICE.match(stem):
        raise PathError(path, "a name that some systems reserve for a device")


class _Use(Enum):
    FILE = "a file"
    EMPTY = "an empty folder"
    HOLDER = "a folder that holds something"


def check_together(files: Iterable[str], empty_folders: Iterable[str]) -> None:
    """Refuse with `PathError` paths that cannot stand side by side everywhere: twice the same, one both a file
    and a folder, an empty folder that is not empty, or two that differ only in case or in Unicode
    normalization (they would overwrite each other on another system). Each path was checked before."""
    seen: dict[str, tuple[str, _Use]] = {}  # folded path -> as written, and what it is
    for use, paths in ((_Use.FILE, files), (_Use.EMPTY, empty_folders)):
        for path in paths:
            if not _claim(seen, path, use):
                raise PathError(path, "named twice")
            end = path.rfind("/")
            while end > 0 and _claim(seen, path[:end], _Use.HOLDER):
                end = path.rfind("/", 0, end)


def _claim(seen: dict[str, tuple[str, _Use]], path: str, use: _Use) -> bool:
    """True when nothing claimed the path before, False when the very same use did."""
    folded = fold(path)
    known = seen.get(folded)
    if known is None:
        seen[folded] = (path, use)
        return True
    known_path, known_use = known
    if known_path != path:
        raise PathError(path, f"differs from {known_path[:300]!a} only in case or in Unicode form")
    if known_use is not use:
        raise PathError(path, f"both {known_use.value} and {use.value}")
    return False


def fold(path: str) -> str:
    """What a file system that ignores case and normalization would make of `path` (Unicode, D145)."""
    if path.isascii():
        return path.lower()
    folded = unicodedata.normalize("NFD", path).casefold()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", folded))
