"""No two rigs or test processes of a machine are given the same port, though nobody listens on it yet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from chaos_tests.ports import FIRST, LAST, free_base_port, free_ports

TAKE = """
import json, sys
from chaos_tests.ports import free_base_port, free_ports
for line in sys.stdin:
    base = free_base_port(4)
    trackers = [*range(base, base + 4), *range(base + 100, base + 104)]
    print(json.dumps(free_ports(int(line)) + trackers), flush=True)
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
        assert len(set(taken)) == 3 * 4 * (6 + 8)
        assert all(FIRST <= port < LAST for port in taken)
    finally:
        for taker in takers:
            taker.kill()
            taker.communicate()


def test_a_port_in_use_is_not_given() -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port)):  # who was given it can listen on it
        assert port not in free_ports(20)


def test_a_base_is_given_only_when_all_its_ports_are_nobodys() -> None:
    base = free_base_port(3)
    ours = {*range(base, base + 3), *range(base + 100, base + 103)}
    with socket.create_server(("127.0.0.1", base + 102)):
        others = [free_base_port(3) for _ in range(20)]
    assert not ours & {port + apart + node for port in others for apart in (0, 100) for node in range(3)}
    assert not ours & set(free_ports(100))
