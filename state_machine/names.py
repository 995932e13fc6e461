"""What a name, an identifier, a number may be. Pure checks; each gives the message for the person.

Owned here: the form of names. Whether a name is taken or known is the rules'.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from . import limits

# Control characters (C0, DEL, C1), line and paragraph separators, and the invisible marks with which
# one name can be made to look like another (zero width, direction).
_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f/\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_PEER_ID: Final = re.compile(r"[a-z2-7]{52}")
_MANIFEST_ID: Final = re.compile(r"[0-9a-f]{64}")
# The Unicode database of Python 3.11 is not that of 3.13; one that never changes gives the same verdict
# on every node, also halfway through an upgrade.
_UNICODE: Final = unicodedata.ucd_3_2_0


def quoted(name: str) -> str:
    """The name as it may stand in a message: printable, and no longer than a message can bear."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def name_fault(name: str, what: str) -> str | None:
    """Why `name` cannot be the name of a `what`; None when it can. Lengths are not checked here."""
    if not name:
        return f"the {what} is empty"
    if name in (".", ".."):
        return f"the {what} cannot be {name!r}"
    if _FORBIDDEN.search(name) is not None:
        return f"the {what} {quoted(name)} holds '/', a control character or an invisible one"
    if name != name.strip():
        return f"the {what} {quoted(name)} begins or ends with white space"
    if not name.isascii() and not _UNICODE.is_normalized("NFC", name):
        return f"the {what} {quoted(name)} is not in Unicode normal form C"
    return None


def is_peer_id(text: str) -> bool:
    return _PEER_ID.fullmatch(text) is not None


def is_manifest_id(text: str) -> bool:
    """Also the form of every other SHA-256 written in hex."""
    return _MANIFEST_ID.fullmatch(text) is not None


def file_name_bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


_UUID7: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def uuid7_ms(request_id: str) -> int | None:
    """When the UUIDv7 was minted, by its minter's clock (RFC 9562, 5.7); None for what is none."""
    if len(request_id) != limits.REQUEST_ID_CHARS or _UUID7.fullmatch(request_id) is None:
        return None
    return int(request_id[:8] + request_id[9:13], 16)
