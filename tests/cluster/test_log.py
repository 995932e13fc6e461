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


def test_an_error_of_a_library_is_logged_with_where_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, check=True, timeout=60)
    (line,) = done.stderr.splitlines()
    told = orjson.loads(line)
    assert told["event"] == "a request from somewhere failed"
    assert "Traceback" in told["exception"]
    assert "ConnectionResetError: the caller left" in told["exception"]
