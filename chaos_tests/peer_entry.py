"""The `trimaran` command as the rig runs peers: the product's own, which may be made to lie.

    python -m chaos_tests.peer_entry peer run ...

`TRIMARAN_RIG_LIE=0.05` garbles that share of the stretches it sends, under intact TLS: whoever receives them
must notice by the pieces' hashes alone. Tells its lies as lines `RIG {"lies": n}` on standard error, and, at SIGUSR2, what
each of its tasks waits for.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys

from peer.outlets import TlsOutlet


def lie(chance: float) -> None:
    plain = TlsOutlet._write

    def write(self: TlsOutlet, head: bytes, data: bytes | memoryview) -> int:
        if isinstance(data, bytes) and random.random() < chance:  # from the file, not from memory
            place = random.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            sys.stderr.write('RIG {"lies": 1}\n')
            sys.stderr.flush()
        return plain(self, head, data)

    TlsOutlet._write = write  # type: ignore[method-assign]


def tell_tasks(*_: object) -> None:
    """What the event loop's tasks wait for: the only witness of a download that stands still."""
    for task in asyncio.all_tasks():
        task.print_stack(limit=12, file=sys.stderr)
    sys.stderr.flush()


def main() -> None:
    signal.signal(signal.SIGUSR2, tell_tasks)
    if chance := os.environ.pop("TRIMARAN_RIG_LIE", ""):
        lie(float(chance))
    from trimaran.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
