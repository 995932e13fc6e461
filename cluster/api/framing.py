"""Where the next request begins on a connection whose requests aiohttp reads (RFC 9112, 6).

Nodes and peers answer what they are asked most without a request object in between. They may recognise such a request
only where one begins, so everything else is followed by its framing. Owned here: that, and giving up as soon as an
end is not certain. Left to others: what is recognised, and answering it (`cluster/short_way.py`, `peer/short_way.py`).
"""

from __future__ import annotations

import re
from typing import Final

_FRAMING: Final = re.compile(
    rb"\r\n(content-length|transfer-encoding|upgrade|expect)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE
)
_LENGTH_DIGITS_MAX: Final = 9


class Framing:
    """What one connection has been sent. Show `follow` every read that aiohttp is given."""

    __slots__ = ("_left_bytes", "_unanswered", "certain")

    def __init__(self) -> None:
        self.certain = True
        """Whether it is known where the next request begins; if not, it never will be again."""
        self._left_bytes = 0  # of the body of the request that aiohttp reads
        self._unanswered = 0  # requests that aiohttp was given

    @property
    def idle(self) -> bool:
        """A request may begin here: nothing of an earlier one is to come, nor its answer to leave."""
        return not self._unanswered and not self._left_bytes

    def follow(self, data: bytes) -> None:
        """Where the request that aiohttp is given ends, if that is certain."""
        if self._left_bytes:
            self._left_bytes -= len(data)
            self.certain = self._left_bytes >= 0
            return
        self._unanswered += 1
        end = data.find(b"\r\n\r\n")
        length = 0
        if end > 0:
            found = _FRAMING.findall(data, 0, end)
            if found:
                length = length_of(found[0][1]) if len(found) == 1 and len(found[0][0]) == 14 else -1
        self._left_bytes = length - (len(data) - end - 4)
        self.certain = (
            end > 0
            and length >= 0
            and self._left_bytes >= 0
            and data.count(b"\n", 0, end) == data.count(b"\r\n", 0, end)
        )

    def answered(self) -> None:
        """aiohttp has answered one."""
        self._unanswered -= 1


def length_of(digits: bytes) -> int:
    """The value of a Content-Length; -1 for what is none, or too long to be meant."""
    digits = digits.strip(b" \t")
    return int(digits) if digits.isdigit() and len(digits) <= _LENGTH_DIGITS_MAX else -1
