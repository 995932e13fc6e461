"""The product from outside: the installed command, real processes, nothing imported from it.

Everything here and in the tests beside it was written against the documented interface alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warm import run_warm

from chaos_tests.ports import free_base_port

COMMAND = str(Path(sys.executable).with_name("trimaran"))
PASSWORD = "correct horse battery"
INSTALLED = bool(os.environ.get("TRIMARAN_INSTALLED") or os.environ.get("TRIMARAN_FULL"))
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("TRIMARAN_") and name not in ("COLUMNS", "LINES")  # a test runner sets them
}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        lines = self.out.splitlines()
        assert len(lines) == 1, (self.out, self.err)
        return json.loads(lines[0])

    @property
    def error(self) -> dict[str, str]:
        assert self.out == "", self.out
        error = json.loads(self.err.splitlines()[-1])["error"]
        assert error.keys() >= {"code", "message", "outcome", "hint"}
        assert error["outcome"] in ("definite", "indefinite")
        return error


class Process:
    """A long-running command that says one JSON line when it is ready."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [COMMAND, *argv, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=CLEAN | environment,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"{argv} did not become ready: {self.process.communicate()}")
        self.ready: dict[str, Any] = json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """As Ctrl-C. Answers the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode


@dataclass
class Cluster:
    data_dir: Path
    base_port: int
    process: Process = field(init=False)

    def start(self) -> None:
        argv = ["tracker", "local", "--nodes", "3", "--data-dir", str(self.data_dir)]
        home = str(self.data_dir.with_name("operator-home"))
        self.process = Process([*argv, "--base-port", str(self.base_port)], {"TRIMARAN_HOME": home})

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self.process.ready["nodes"]  # type: ignore[no-any-return]

    @property
    def options(self) -> dict[str, str]:
        return {
            "TRIMARAN_TRACKERS": ",".join(node["http"] for node in self.nodes),
            "TRIMARAN_CA": self.process.ready["ca"],
        }

    def status(self) -> dict[str, Any]:
        return self.run("cluster", "status").json  # type: ignore[no-any-return]

    def run(self, *argv: str) -> Done:
        return run(*argv, environment=self.options)

    def kill_leader(self) -> str:
        leader = self.status()["leader"]
        (pid,) = [node["pid"] for node in self.nodes if node["id"] == leader]
        os.kill(pid, signal.SIGKILL)
        return str(leader)


def run(
    *argv: str,
    environment: dict[str, str],
    stdin: str = "",
    timeout_seconds: float = 120.0,
    as_json: bool = True,
) -> Done:
    whole = [*argv, *(["--json"] if as_json else [])]
    if INSTALLED:
        done = subprocess.run(
            [COMMAND, *whole],
            input=stdin,
            capture_output=True,
            text=True,
            env=CLEAN | environment,
            timeout=timeout_seconds,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = run_warm(whole, CLEAN | environment, stdin, timeout_seconds)
    assert "Traceback" not in out + err, err
    return Done(code, out, err)


class Person:
    """A user with a home, which is a peer, on this machine."""

    def __init__(self, cluster: Cluster, home: Path, name: str) -> None:
        self.name = name
        self.home = home
        self.environment = cluster.options | {"TRIMARAN_HOME": str(home), "TRIMARAN_PASSWORD": PASSWORD}
        self.peer: Process | None = None

    def run(self, *argv: str, **more: Any) -> Done:
        return run(*argv, environment=self.environment | more.pop("environment", {}), **more)

    def ok(self, *argv: str, **more: Any) -> Any:
        done = self.run(*argv, **more)
        assert done.code == 0, (argv, done)
        return done.json

    def refused(self, code: int, *argv: str, **more: Any) -> dict[str, str]:
        done = self.run(*argv, **more)
        assert done.code == code, (argv, done)
        return done.error

    def start_peer(self, *argv: str) -> dict[str, Any]:
        self.peer = Process(["peer", "run", "--listen", "127.0.0.1:0", *argv], self.environment)
        return self.peer.ready

    def stop_peer(self) -> None:
        if self.peer is not None:
            peer, self.peer = self.peer, None
            assert peer.stop() == 0

    def row(self, group: str, name: str) -> dict[str, Any] | None:
        """The file's row in `ps`."""
        rows = [each for each in self.ok("ps") if (each["group"], each["name"]) == (group, name)]
        return rows[0] if rows else None


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Until the condition holds. Answers what it answered."""
    deadline = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder / "trackers", free_base_port(3))
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.process.stop()
