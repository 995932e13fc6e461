"""The `trimaran` command as the rig runs peers: the product's own, which may be made to lie.

    python -m chaos_tests.peer_entry peer run ...

`TRIMARAN_RIG_LIE=0.05` garbles that share of the stretches it sends, under intact TLS: whoever receives them
must notice by the pieces' hashes alone. Tells its lies as lines `RIG {"lies": n}` on standard error.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

from peer.sending import PieceSender


class _Garbling:
    """A writer that flips a bit now and then."""

    def __init__(self, writer: Any, chance: float) -> None:
        self._writer, self._chance = writer, chance

    async def write(self, data: bytes) -> None:
        if random.random() < self._chance:
            place = random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            sys.stderr.write('RIG {"lies": 1}\n')
            sys.stderr.flush()
        await self._writer.write(data)


def lie(chance: float) -> None:
    plain = PieceSender._send_written

    async def send_written(self: PieceSender, sending: Any, writer: Any, content: Any, spans: Any) -> None:
        await plain(self, sending, _Garbling(writer, chance), content, spans)  # type: ignore[arg-type]

    PieceSender._send_written = send_written  # type: ignore[method-assign]


def main() -> None:
    if chance := os.environ.pop("TRIMARAN_RIG_LIE", ""):
        lie(float(chance))
    from trimaran.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
