"""The two clusters of `benchmarks/consensus.py`: Trimaran's trackers and etcd, three nodes each, as
processes on loopback, synced to disk, plain HTTP on both (TLS on neither).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.processes import Process, free_ports, wait_until

VALUE_BYTES = 64
KEYS = 1000


def request_id(number: int) -> str:
    """A UUIDv7 of now; no number may come twice in a millisecond."""
    moment = time.time_ns() // 1_000_000
    text = f"{moment:012x}7{number % 4096:03x}8{number % (1 << 60):015x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def ask(
    url: str,
    method: str = "GET",
    body: object = None,
    headers: dict[str, str] | None = None,
    seconds: float = 5.0,
) -> tuple[int, dict[str, object]]:
    """One plain request; status 0 when there was no answer."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(
        url, data, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        raw = error.read()
        try:
            return error.code, json.loads(raw)
        except ValueError:
            return error.code, {}
    except (OSError, ValueError):
        return 0, {}


class Cluster(ABC):
    """Three nodes and how to write to them."""

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Process] = []
        self.urls: list[str] = []

    @staticmethod
    @abstractmethod
    def missing() -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def restart(self, number: int) -> None: ...

    @abstractmethod
    def leader(self) -> int | None: ...

    @abstractmethod
    def revision(self) -> int:
        """The store's own count of changes, as the leader knows it."""

    @abstractmethod
    def load_script(self) -> str:
        """A Lua script for `wrk`: each request is one acknowledged write of about `VALUE_BYTES`. `id` is the
        thread's number, a global: what `setup` sets is not seen by a local."""

    @abstractmethod
    def write_once(self, number: int, sequence: int, seconds: float) -> bool:
        """One write through one node; True when acknowledged."""

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()

    def until_led(self) -> int:
        """The leader's number; on a crowded machine one may be elected just then."""
        until = time.monotonic() + 30
        while (leader := self.leader()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.name} has had no leader for 30 s")
            time.sleep(0.05)
        return leader

    def cpu_seconds(self) -> float:
        return sum(node.cpu_seconds() for node in self.nodes)

    def peak_bytes(self) -> int:
        return max((node.peak_bytes() for node in self.nodes), default=0)


class Etcd(Cluster):
    name = "etcd"

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("etcd") else "etcd is not installed (Debian: etcd-server)"

    def start(self) -> None:
        ports = free_ports(6)
        self.urls = [f"http://127.0.0.1:{port}" for port in ports[:3]]
        peers = [f"http://127.0.0.1:{port}" for port in ports[3:]]
        members = ",".join(f"n{i}={url}" for i, url in enumerate(peers))
        self._commands = [
            [
                "etcd", "--name", f"n{i}", "--data-dir", str(self.folder / f"etcd-{i}"), "--log-level", "error",
                "--listen-client-urls", self.urls[i], "--advertise-client-urls", self.urls[i],
                "--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i],
                "--initial-cluster", members, "--initial-cluster-state", "new",
            ]
            for i in range(3)
        ]  # fmt: skip
        self.nodes = [
            Process(command, self.folder / f"etcd-{i}.log") for i, command in enumerate(self._commands)
        ]
        wait_until(lambda: self.leader() is not None, 30, "etcd elects", self.nodes)

    def restart(self, number: int) -> None:
        self.nodes[number] = Process(self._commands[number], self.folder / f"etcd-{number}.log")

    def leader(self) -> int | None:
        for i, url in enumerate(self.urls):
            status, answer = ask(f"{url}/v3/maintenance/status", "POST", {}, seconds=1)
            header = answer.get("header")
            if status == 200 and isinstance(header, dict) and answer.get("leader") == header.get("member_id"):
                return i
        return None

    def revision(self) -> int:
        leader = self.until_led()
        header = ask(f"{self.urls[leader]}/v3/maintenance/status", "POST", {})[1]["header"]
        assert isinstance(header, dict)
        return int(header["revision"])

    def load_script(self) -> str:
        value = base64.b64encode(b"v" * VALUE_BYTES).decode()
        return f"""
local n = 0
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
function init(args) math.randomseed(id + 1) end
request = function()
  n = n + 1
  local key = string.format("bench-%04d", math.random(0, {KEYS - 1}))
  return wrk.format("POST", "/v3/kv/put", {{["Content-Type"]="application/json"}},
    '{{"key":"' .. enc(key) .. '","value":"{value}"}}')
end
local chars = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
function enc(s)
  local out = {{}}
  for i = 1, #s, 3 do
    local a, b, c = s:byte(i, i + 2)
    local x = a * 65536 + (b or 0) * 256 + (c or 0)
    for k = 3, 0, -1 do
      local d = math.floor(x / 64 ^ k) % 64 + 1
      out[#out + 1] = chars:sub(d, d)
    end
    if not b then out[#out - 1] = '='; out[#out] = '=' elseif not c then out[#out] = '=' end
  end
  return table.concat(out)
end
"""

    def write_once(self, number: int, sequence: int, seconds: float) -> bool:
        key = base64.b64encode(f"probe-{sequence}".encode()).decode()
        status, _ = ask(f"{self.urls[number]}/v3/kv/put", "POST", {"key": key, "value": key}, seconds=seconds)
        return status == 200


class Trimaran(Cluster):
    name = "trimaran"

    @staticmethod
    def missing() -> str | None:
        return None

    def start(self) -> None:
        ports = free_ports(1)
        command = [
            sys.executable, "-m", "trimaran", "tracker", "local", "--nodes", "3", "--data-dir", str(self.folder / "trimaran"),
            "--base-port", str(ports[0]), "--insecure", "--json",
        ]  # fmt: skip
        self._launcher = Process(command, self.folder / "trimaran.log")
        wait_until(
            lambda: b'"nodes"' in self._launcher.log.read_bytes(), 30, "the trackers start", [self._launcher]
        )
        line = next(part for part in self._launcher.log.read_text().splitlines() if '"nodes"' in part)
        told = json.loads(line)
        self.urls = [node["http"] for node in told["nodes"]]
        self._folders = [node["data_dir"] for node in told["nodes"]]
        self.nodes = [_Adopted(node["pid"], self._launcher) for node in told["nodes"]]
        wait_until(lambda: self.leader() is not None, 30, "the trackers elect", [self._launcher])
        self.session = self._sign_in()

    def _sign_in(self) -> str:
        user = {"user": "bench", "password": "a long enough password"}
        status, answer = ask(f"{self.urls[0]}/v1/users", "POST", user, {"Idempotency-Key": request_id(1)}, 20)
        assert status == 200, (status, answer)
        status, answer = ask(f"{self.urls[0]}/v1/sessions", "POST", user, seconds=20)
        assert status == 200, (status, answer)
        session = str(answer["session"])
        headers = {"Idempotency-Key": request_id(2), "Authorization": f"Bearer {session}"}
        status, answer = ask(f"{self.urls[0]}/v1/groups", "POST", {"name": "bench"}, headers, 20)
        assert status == 200, (status, answer)
        return session

    def restart(self, number: int) -> None:
        command = [
            sys.executable,
            "-m",
            "trimaran",
            "tracker",
            "run",
            "--data-dir",
            self._folders[number],
        ]
        self.nodes[number] = Process(command, self.folder / f"trimaran-{number}.log")

    def leader(self) -> int | None:
        for i, url in enumerate(self.urls):
            status, answer = ask(f"{url}/v1/status", seconds=1)
            if status == 200 and answer.get("leader") == answer.get("node") and answer.get("leader"):
                return i
        return None

    def revision(self) -> int:
        leader = self.until_led()
        return int(str(ask(f"{self.urls[leader]}/v1/status")[1]["revision"]))

    def load_script(self) -> str:
        """Publishing a file's new version: sign-in checked, rights checked, a synced, replicated change."""
        return f"""
local n = 0
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
local seed = 0
function init(args) math.randomseed(os.time() * 1000 + id * 7919 + {os.getpid()}); seed = math.random(0, 2^30) end
request = function()
  n = n + 1
  local ms = os.time() * 1000
  local key = string.format("%08x-%04x-7%03x-8%03x-%04x%08x", math.floor(ms / 65536) % 4294967296, ms % 65536, n % 4096,
    id % 4096, math.floor(n / 4096) % 65536, seed)
  local manifest = string.format("%08x%056x", n % 4294967296, id)
  local name = string.format("bench-%04d", math.random(0, {KEYS - 1}))
  return wrk.format("PUT", "/v1/groups/bench/files/" .. name,
    {{["Content-Type"]="application/json", ["Authorization"]="Bearer {self.session}", ["Idempotency-Key"]=key}},
    '{{"kind":"file","size_bytes":1048576,"pieces":4,"piece_bytes":262144,"algorithm":"sha256","manifest_id":"' .. manifest .. '","replace":true}}')
end
"""

    def write_once(self, number: int, sequence: int, seconds: float) -> bool:
        headers = {"Idempotency-Key": request_id(sequence), "Authorization": f"Bearer {self.session}"}
        body = {
            "kind": "file", "size_bytes": 1, "pieces": 1, "piece_bytes": 262144, "algorithm": "sha256",
            "manifest_id": f"{sequence:064x}", "replace": True,
        }  # fmt: skip
        status, _ = ask(f"{self.urls[number]}/v1/groups/bench/files/probe", "PUT", body, headers, seconds)
        return status == 200

    def stop(self) -> None:
        for node in self.nodes:
            if not isinstance(node, _Adopted):
                node.kill()
        self._launcher.stop()


class _Adopted(Process):
    """A tracker that `tracker local` started: measured and killed here, waited for there."""

    def __init__(self, pid: int, launcher: Process) -> None:
        self._pid, self.child, self.log, self.command = pid, launcher.child, launcher.log, ["tracker"]

    @property
    def pid(self) -> int:
        return self._pid

    def kill(self) -> None:
        self._end(signal.SIGKILL, 5)

    def stop(self, within_seconds: float = 10.0) -> int:
        self._end(signal.SIGTERM, within_seconds)
        return 0

    def _end(self, number: int, within_seconds: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)
        wait_until(lambda: not _alive(self._pid), within_seconds, "a tracker ends")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
