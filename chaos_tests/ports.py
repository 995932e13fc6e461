"""Ports for trackers and peers that the rig and the tests start, stop and start again.

A port is chosen long before its process listens, and must be free again at every restart. So they are below the
ephemeral range, where no outgoing connection takes them, apart from where the demo looks, and each is reserved for as
long as this process lives: by an abstract Unix socket of its name, which the kernel lets go of whatever happens.
Two processes that merely looked whether a port was free would choose the same ones.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

from cluster.local import RAFT_PORT_OFFSET

FIRST, LAST = 10_000, 16_800

_reserved: list[socket.socket] = []
_candidates = itertools.cycle(random.Random(os.getpid()).sample(range(FIRST, LAST), LAST - FIRST))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are nobody's until this process ends. Raises `OSError` when none are left."""
    found: list[int] = []
    for candidate in itertools.islice(_candidates, LAST - FIRST):
        if _is_free(candidate) and _reserve(candidate):
            found.append(candidate)
            if len(found) == count:
                return found
    raise OSError(f"no {count} free ports between {FIRST} and {LAST}")


def free_base_port(nodes: int) -> int:
    """As `free_ports`, for trackers that `prepare` numbers: HTTP on it and the next ones, Raft 100 above."""
    for base in itertools.islice(_candidates, LAST - FIRST):
        ports = [base + node + apart for apart in (0, RAFT_PORT_OFFSET) for node in range(nodes)]
        if ports[-1] < LAST and all(_is_free(port) for port in ports):
            reserved = len(_reserved)
            if all(_reserve(port) for port in ports):
                return base
            while len(_reserved) > reserved:
                _reserved.pop().close()
    raise OSError(f"no free ports for {nodes} trackers between {FIRST} and {LAST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reserve(port: int) -> bool:
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        mark.bind(f"\0trimaran-rig-port-{port}")
    except OSError:
        mark.close()
        return False
    _reserved.append(mark)
    return True
