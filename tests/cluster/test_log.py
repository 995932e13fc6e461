"""What a tracker's log says: one JSON line for each event, errors with where they were."""

from __future__ import annotations

import subprocess
import sys

import orjson

FAILING = """
import logging
from cluster.app import configure_log
configure_log("info")
try:
    raise ConnectionResetError("the caller left")
except ConnectionResetError:
    logging.getLogger("aiohttp.server").exception("a request from %s failed", "somewhere")
"""
STARVED = """
import asyncio, os, resource, socket
from cluster.app import LoopTrouble, configure_log

async def main():
    asyncio.get_running_loop().set_exception_handler(LoopTrouble())
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, backlog=128)
    address = server.sockets[0].getsockname()
    callers = [socket.socket() for _ in range(40)]
    most = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1, most + 1))
    for caller in callers:
        caller.setblocking(False)
        caller.connect_ex(address)
    await asyncio.sleep(2.5)  # asyncio tries again after one

configure_log("info")
asyncio.run(main())
"""


def test_a_tracker_without_descriptors_says_so_once_and_not_a_thousand_times() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, check=True, timeout=60)
    (line,) = done.stderr.splitlines()
    told = orjson.loads(line)
    assert (told["event"], told["reason"]) == ("new connections must wait", "Too many open files")


def test_an_error_of_a_library_is_logged_with_where_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, check=True, timeout=60)
    (line,) = done.stderr.splitlines()
    told = orjson.loads(line)
    assert told["event"] == "a request from somewhere failed"
    assert "Traceback" in told["exception"]
    assert "ConnectionResetError: the caller left" in told["exception"]
