"""No two rigs of a machine are given the same port, though nobody listens on it yet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from chaos_tests.ports import FIRST, LAST, free_ports

TAKE = """
import json, sys
from chaos_tests.ports import free_ports
for line in sys.stdin:
    print(json.dumps(free_ports(int(line))), flush=True)
"""


def test_processes_beside_each_other_get_different_ports() -> None:
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(3)
    ]
    try:
        taken: list[int] = []
        for _ in range(4):
            for taker in takers:
                assert taker.stdin is not None
                taker.stdin.write("6\n")
                taker.stdin.flush()
            for taker in takers:
                assert taker.stdout is not None
                taken += json.loads(taker.stdout.readline())
        assert len(set(taken)) == 3 * 4 * 6
        assert all(FIRST <= port < LAST for port in taken)
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_a_port_in_use_is_not_given() -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)):  # who was given it can listen on it
        assert port not in free_ports(20)
