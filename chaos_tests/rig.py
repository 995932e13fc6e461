"""The rig: a cluster of real tracker processes, every link through a proxy, and a hand on each of them.

Owned here: starting, killing, pausing and damaging trackers, and their links. What a fault is stands in
`faults.py`, what users do in `workload.py`, what peers do in `swarm.py`. No root needed; small file systems
(for full disks) and the clock shim are used where they can be had, and their absence is said.

A node dials others through `chaos_tests/node_entry.py`, which alone knows that there are proxies: the
product has no such setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import takewhile
from pathlib import Path

from chaos_tests import ending, wall_clock
from chaos_tests.client import Api, Reply, request_id
from chaos_tests.history import Fault, Recorder, Sample
from chaos_tests.ports import free_ports
from chaos_tests.proxy import Direction, Link
from chaos_tests.ways import Way

START_SECONDS = 60.0
CLI = [sys.executable, "-m", "trimaran"]
SMALL_DISK_BYTES = 96 << 20
ASK_ROLE_SECONDS = 0.2
REFUSED_SECONDS_MAX = 15.0


class Node:
    """One tracker: its folder, its ports, its process."""

    def __init__(self, node_id: str, folder: Path, host: str, http: int, raft: int) -> None:
        self.node_id, self.folder, self.host, self.http, self.raft = node_id, folder, host, http, raft
        self.process: asyncio.subprocess.Process | None = None
        self.log = folder.with_suffix(".log")
        self.paused = False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Rig:
    proxied = True  # every link between nodes goes through a proxy of ours

    def __init__(
        self,
        folder: Path,
        recorder: Recorder,
        nodes: int,
        seed: int,
        *,
        corrections_off: str = "",
        raft_settings: Mapping[str, float] | None = None,
        requests_kept: int = 0,
    ) -> None:
        self.folder, self.recorder, self.seed = folder, recorder, seed
        self.node_ids = [f"n{i + 1}" for i in range(nodes)]
        self.nodes: dict[str, Node] = {}
        self.clocks: dict[str, wall_clock.WallClock] = {}
        self.small_disks = False
        self.missing: list[str] = []  # what cannot be had here, said in the report
        self.makes_snapshots = "log_bytes_before_snapshot" in (raft_settings or {})
        self._variables = {
            # Passwords are not what is tried here: hashing them cheaply leaves the processor to what is.
            "TRIMARAN_SERVICE_HASH_MEMORY_KIB": "256",
            "TRIMARAN_SERVICE_HASH_PASSES": "1",
            "TRIMARAN_RIG_CORRECTIONS_OFF": corrections_off,
            "TRIMARAN_RIG_REQUESTS_KEPT": str(requests_kept or ""),
            **{f"TRIMARAN_RAFT_SETTINGS_{k.upper()}": str(v) for k, v in (raft_settings or {}).items()},
        }
        self._raft_links: dict[tuple[str, str], Link] = {}
        self._user_links: dict[str, Link] = {}
        self._user_ports: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._generation = 0
        self._mounts: list[Path] = []
        self._seen = ""  # of what is waited for
        self._tls: ssl.SSLContext | None = None  # of users
        self.peers_rest = asyncio.Lock()  # held while something is done to a peer, or while none may be
        self.downloads_go_on: Callable[[], bool] = lambda: True  # told by whoever runs peers

    def host(self, node_id: str) -> str:
        return "127.0.0.1"

    def prefix(self, node_id: str) -> list[str]:
        """What a node's command runs under."""
        return []

    def dial_places(self, node_id: str) -> dict[str, str]:
        """Where it finds the others: at our proxies."""
        links = ((b, self._raft_links[node_id, b]) for b in self.node_ids if b != node_id)
        return {b: f"127.0.0.1:{link.port}" for b, link in links}

    # --- start and stop ---------------------------------------------------------------------------

    async def set_up(self) -> None:
        """Make the cluster: CA, folders, membership, proxies; start all nodes and wait until they serve."""
        self._prepare_shim()
        ports = free_ports(2 * len(self.node_ids))
        for i, node_id in enumerate(self.node_ids):
            folder = self.folder / node_id
            self._mount_small(folder)
            self.nodes[node_id] = Node(node_id, folder, self.host(node_id), ports[2 * i], ports[2 * i + 1])
        for a in self.node_ids:
            self._user_links[a] = Link(f"users>{a}", (self.nodes[a].host, self.nodes[a].http), self.seed)
            self._user_ports[a] = await self._user_links[a].start()
            for b in self.node_ids:
                if a != b:
                    link = Link(f"{a}>{b}", (self.nodes[b].host, self.nodes[b].raft), self.seed)
                    await link.start()
                    self._raft_links[a, b] = link
        first, *others = self.node_ids
        await self._cli("tracker", "init", "--node-id", first, *self._places(first))
        await self._start_well(first)
        for node_id in others:
            await self._join(first, node_id)
            await self._start_well(node_id)
        await self._until(self._all_voting, START_SECONDS, "all nodes count")
        self._watch_roles()

    async def _start_well(self, node_id: str) -> None:
        """Raises `RuntimeError` when it does not come up: in setting up nothing may hurt it."""
        await self.start(node_id)
        node = self.nodes[node_id]
        if not await self._answers(node) or not node.alive:
            raise RuntimeError(f"{node_id} does not come up: {node.log.read_text(errors='replace')[-500:]}")

    async def _join(self, through: str, node_id: str) -> None:
        node = self.nodes[node_id]
        invite = self.folder / f"{node_id}.invite"
        told = await self._cli(
            "tracker",
            "invite",
            node_id,
            "--raft",
            f"{node.host}:{node.raft}",
            "--data-dir",
            str(self.nodes[through].folder),
        )
        invite.write_text(told)
        await self._cli("tracker", "init", "--join", str(invite), *self._places(node_id))

    def _places(self, node_id: str) -> list[str]:
        node = self.nodes[node_id]
        return [
            "--http",
            f"{node.host}:{node.http}",
            "--raft",
            f"{node.host}:{node.raft}",
            "--data-dir",
            str(node.folder),
        ]

    def _prepare_shim(self) -> None:
        try:
            shim = wall_clock.build(self.folder)
        except wall_clock.Unavailable as reason:
            self.missing.append(str(reason))
            return
        for node_id in self.node_ids:
            self.clocks[node_id] = wall_clock.WallClock(shim, self.folder / f"{node_id}.clock")

    def _mount_small(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        if os.geteuid() != 0:
            self.missing.append("full disks: a small file system needs root")
            return
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            self.missing.append(f"full disks: {done.stderr.decode().strip()}")
            return
        self._mounts.append(folder)
        self.small_disks = True

    async def tear_down(self) -> list[Exception]:
        """Returns what went wrong in the rig itself."""
        raised = await ending.end(self._tasks)
        for node in self.nodes.values():
            await self.kill(node.node_id)
        for link in [*self._raft_links.values(), *self._user_links.values()]:
            await link.stop()
        for clock in self.clocks.values():
            clock.close()
        return raised

    def keep_logs(self, out: Path) -> None:
        """Of nodes, of peers and of the commands in their homes."""
        for log in self.folder.rglob("*.log"):
            if not log.name.startswith("journal-"):
                shutil.copy(log, out / "-".join(log.relative_to(self.folder).parts))

    def keep_data(self, out: Path) -> None:
        """The nodes' data folders, for whoever looks into a failure, and those that were damaged and taken."""
        for folder in [node.folder for node in self.nodes.values()] + list(self.folder.glob("damaged-*")):
            if folder.exists():
                shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)

    def copy_damaged(self, node_id: str) -> Path:
        copy = self.folder / f"damaged-{node_id}-{self._generation}"
        shutil.copytree(self.nodes[node_id].folder / "raft", copy)
        return copy

    def unmount(self) -> None:
        """Release small file systems."""
        for folder in self._mounts:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)

    # --- nodes ------------------------------------------------------------------------------------

    async def start(self, node_id: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a node; returns when it answers, or has ended (as with a kill point)."""
        node = self.nodes[node_id]
        if node.alive:
            return
        variables = {
            **os.environ,
            "TRIMARAN_RIG_DIAL": ",".join(f"{b}={place}" for b, place in self.dial_places(node_id).items()),
            **self._variables,
            **(self.clocks[node_id].environment if node_id in self.clocks else {}),
            **(environment or {}),
        }
        with node.log.open("ab") as log:
            node.process = await asyncio.create_subprocess_exec(
                *self.prefix(node_id), sys.executable, "-m", "chaos_tests.node_entry", "--data-dir", str(node.folder),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=variables, cwd=Path(__file__).parents[1],
            )  # fmt: skip
        await self._until(lambda: self._answers(node), START_SECONDS, f"{node_id} answers", quietly=True)

    async def restart_ended(self) -> list[Fault]:
        """Between faults all nodes live. One that has ended is a finding; it is started again, as its operator would."""
        found = []
        for node_id, node in self.nodes.items():
            if node.alive or node.process is None:
                continue
            now = self.recorder.now_ns()
            last = node.log.read_text(errors="replace").strip().rpartition("\n")[2][:300]
            wrong = f"{node_id} ended by itself with {node.process.returncode}: {last}"
            fault = Fault(
                kind="a node ended", target=node_id, begin_ns=now, end_ns=now, bit=True, wrong=wrong
            )
            self.recorder.add(fault)
            found.append(fault)
            await self.start(node_id)
        return found

    async def _answers(self, node: Node) -> bool:
        if not node.alive:
            return True
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(node.host, node.http), 1)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def kill(self, node_id: str) -> bool:
        """kill -9; True when it was alive and has ended."""
        node = self.nodes[node_id]
        if not node.alive or node.process is None:
            return False
        if node.paused:
            self.go_on(node_id)
        node.process.kill()
        await node.process.wait()
        return True

    def pause(self, node_id: str) -> bool:
        node = self.nodes[node_id]
        if not node.alive or node.process is None:
            return False
        node.process.send_signal(signal.SIGSTOP)
        node.paused = True
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            state = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                return True
        return False

    def go_on(self, node_id: str) -> None:
        node = self.nodes[node_id]
        if node.paused and node.process is not None:
            node.paused = False
            with contextlib.suppress(ProcessLookupError):
                node.process.send_signal(signal.SIGCONT)

    async def ends_within(self, node_id: str, seconds: float) -> bool:
        process = self.nodes[node_id].process
        if process is None:
            return False
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def dies_within(self, node_id: str, seconds: float) -> bool:
        """Whether a kill point ends it in time."""
        process = self.nodes[node_id].process
        return await self.ends_within(node_id, seconds) and process is not None and process.returncode == 137

    async def refuses_to_start(self, node_id: str) -> str:
        """What it did instead; empty when it ended by itself with the reason."""
        place = self.nodes[node_id].log.stat().st_size
        await self.start(node_id)
        await self.ends_within(node_id, REFUSED_SECONDS_MAX)  # it listens before it has read its disk
        node = self.nodes[node_id]
        said = node.log.read_bytes()[place:].decode(errors="replace").strip()
        if node.alive or node.process is None:
            return f"it serves, and said: {said[-300:]!r}"
        if node.process.returncode == 1 and "must not start" in said:
            return ""
        return f"it ended with {node.process.returncode}, and said: {said[-300:]!r}"

    async def replace(self, node_id: str) -> None:
        """What an operator does with a node whose folder is gone or damaged: remove it, empty the folder,
        invite it as a new one, and see that it counts before anything else is done."""
        node = self.nodes[node_id]
        await self.kill(node_id)
        self._generation += 1
        helper = self.node_ids[0]
        for entry in node.folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        await self.remove(node_id)
        await self._retried(lambda: self._join(helper, node_id))
        await self.start(node_id)
        await self._until(self._all_voting, START_SECONDS, f"{node_id} counts again")

    async def remove(self, node_id: str, through: str = "") -> None:
        """Take a node out of the cluster, as its operator, through any other node (or the one named)."""
        if through:
            reply = await self._remove_once(node_id, through)
            if reply.end != "ok":
                raise RuntimeError(f"removing {node_id} through {through}: {reply.status} {reply.code}")
            return
        others = [other for other in self.node_ids if other != node_id]
        for attempt in range(60):
            reply = await self._remove_once(node_id, others[attempt % len(others)])
            if reply.end == "ok" or (reply.end == "refused" and reply.code == "not_found"):
                return
            await asyncio.sleep(0.3)
        raise RuntimeError(f"{node_id} cannot be removed: {reply.status} {reply.code} {reply.body}")

    async def _remove_once(self, node_id: str, through: str) -> Reply:
        api = self.operator()
        try:
            return await api.call(
                through, "DELETE", f"/v1/cluster/nodes/{node_id}", request_id=request_id(), seconds=10
            )
        finally:
            await api.close()

    async def transfer(self, to: str) -> Reply:
        """Move the leadership, as its operator."""
        api = self.operator()
        try:
            return await api.call(
                to, "POST", "/v1/cluster/leader", body={"to": to}, request_id=request_id(), seconds=10
            )
        finally:
            await api.close()

    # --- disks ------------------------------------------------------------------------------------

    async def fill_disk(self, node_id: str) -> None:
        await asyncio.to_thread(fill, self.nodes[node_id].folder / "filler")

    def free_disk(self, node_id: str) -> None:
        (self.nodes[node_id].folder / "filler").unlink(missing_ok=True)

    async def says_disk_full(self, node_id: str) -> bool:
        api = self.api()
        try:
            return "disk full" in (await api.text(node_id, "/readyz"))[0]
        finally:
            await api.close()

    async def wall_clock_of(self, node_id: str) -> float | None:
        """Seconds by which the node's own wall clock differs from ours, from the `Date` of its answers."""
        api = self.api()
        try:
            date = (await api.text(node_id, "/healthz"))[1]
        finally:
            await api.close()
        return parsedate_to_datetime(date).timestamp() - time.time() if date else None

    def newest_snapshot(self, node_id: str) -> str:
        """The name of the node's latest whole snapshot, which tells its place in the log."""
        return max((path.name for path in self.nodes[node_id].folder.rglob("snapshot-*.snap")), default="")

    async def until_newer_snapshots(
        self, nodes: Sequence[str], before: Mapping[str, str], seconds: float
    ) -> int:
        """Wait until all of them have one; returns how many have when it ends."""
        until = time.monotonic() + seconds
        newer = 0
        while time.monotonic() < until and newer < len(nodes):
            await asyncio.sleep(0.2)
            newer = sum(self.newest_snapshot(node) > before[node] for node in nodes)
        return newer

    def _segments(self, node_id: str) -> list[Path]:
        return sorted(self.nodes[node_id].folder.rglob("journal-*"), key=lambda path: path.name)

    def tear_journal(self, node_id: str, chance: random.Random) -> bool:
        segments = self._segments(node_id)
        if not segments:
            return False
        with segments[-1].open("ab") as file:
            file.write(chance.randbytes(chance.randint(1, 200)))
        return True

    def has_middle_segment(self, node_id: str) -> bool:
        return len(self._segments(node_id)) > 2

    def lose_segment(self, node_id: str, chance: random.Random) -> bool:
        """Not the oldest, whose entries a snapshot may hold as well, nor the last, which may have been begun just then."""
        segments = self._segments(node_id)[1:-1]
        if segments:
            chance.choice(segments).unlink()
        return bool(segments)

    def flip_bit(self, node_id: str, chance: random.Random) -> bool:
        """Anywhere but in the last segment, whose end may be a torn write for all that a node can tell."""
        segments = self._segments(node_id)[:-1]
        if not segments:
            return False
        with chance.choice(segments).open("r+b") as file:
            place = chance.randrange(file.seek(0, os.SEEK_END))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << chance.randrange(8))]))
        return True

    # --- links ------------------------------------------------------------------------------------

    def way(self, a: str, b: str) -> Way:
        directions: list[Direction] = [self._raft_links[a, b].forward, self._raft_links[b, a].backward]
        return Way(directions)

    def user_link(self, node_id: str) -> Link:
        return self._user_links[node_id]

    def reset_links(self) -> int:
        return sum(link.reset() for link in self._raft_links.values())

    def heal(self) -> None:
        for link in [*self._raft_links.values(), *self._user_links.values()]:
            link.heal()
        for node_id in self.node_ids:
            self.go_on(node_id)
        for clock in self.clocks.values():
            clock.step(0)

    def limit_descriptors(self, node_id: str, spare: int | None) -> None:
        """Leave the node room for `spare` more open files than it has now; None lifts the limit."""
        node = self.nodes[node_id]
        if not node.alive or node.process is None:
            return
        _, hard = resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE)
        used = len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))
        soft = hard if spare is None else used + spare
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (soft, hard))

    async def hold_connections(self, node_id: str, count: int) -> list[asyncio.StreamWriter]:
        held = []
        for port in (self.nodes[node_id].http, self.nodes[node_id].raft):
            for _ in range(count // 2):
                try:
                    _, writer = await asyncio.wait_for(
                        asyncio.open_connection(self.nodes[node_id].host, port), 0.5
                    )
                except (OSError, TimeoutError):
                    break
                held.append(writer)
        return held

    async def answers_new_connections(self, node_id: str) -> bool:
        api = self.api()
        try:
            return bool((await api.text(node_id, "/healthz"))[0])
        finally:
            await api.close()

    # --- what nodes say ---------------------------------------------------------------------------

    @property
    def ca(self) -> Path:
        return self.nodes[self.node_ids[0]].folder / "ca.pem"

    @property
    def urls(self) -> dict[str, str]:
        """Each node by its user link."""
        return {node_id: f"https://127.0.0.1:{port}" for node_id, port in self._user_ports.items()}

    def api(self) -> Api:
        if self._tls is None:
            self._tls = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        return Api(self.urls, self._tls)

    def operator(self) -> Api:
        """The operator's session at every node, directly."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        folder = self.nodes[self.node_ids[0]].folder / "operator"
        context.load_cert_chain(folder / "operator.pem", folder / "operator.key")
        return Api({n.node_id: f"https://{n.host}:{n.http}" for n in self.nodes.values()}, context)

    async def leader(self) -> str | None:
        """Who leads, by the latest term any living node tells of in the next moments."""
        until = time.monotonic() + 3
        while time.monotonic() < until:
            leads = [sample for sample in self._recent(2.5 * ASK_ROLE_SECONDS) if sample.role == "leader"]
            if leads:
                return max(leads, key=lambda sample: sample.term).node
            await asyncio.sleep(0.05)
        return None

    def _recent(self, seconds: float) -> Iterator[Sample]:
        begin = self.recorder.now_ns() - int(seconds * 1e9)
        return takewhile(lambda sample: sample.at_ns >= begin, reversed(self.recorder.history.samples))

    def _watch_roles(self) -> None:
        for node_id in self.node_ids:
            self._tasks.add(asyncio.create_task(self._watch_role(node_id)))
            self._tasks.add(asyncio.create_task(self._follow_log(node_id)))

    async def _watch_role(self, node_id: str) -> None:
        """Ask a node its role again and again, directly: not through a link that a fault may hold."""
        api = self.api()
        api.urls = {node_id: f"https://{self.nodes[node_id].host}:{self.nodes[node_id].http}"}
        try:
            while True:
                reply = await api.call(node_id, "GET", "/v1/status", seconds=1)
                if reply.end == "ok":
                    mine = next((n for n in reply.body["nodes"] if n["id"] == node_id), None)
                    self.recorder.add(
                        Sample(
                            at_ns=self.recorder.now_ns(), node=node_id, role=mine["role"] if mine else "removed",
                            term=reply.body["term"], revision=reply.body["revision"], leader=reply.body["leader"],
                        )
                    )  # fmt: skip
                await asyncio.sleep(ASK_ROLE_SECONDS)
        finally:
            await api.close()

    async def _follow_log(self, node_id: str) -> None:
        """Digests and elections, as `node_entry` writes them into the node's log."""
        place = 0
        path = self.nodes[node_id].log
        while True:
            await asyncio.sleep(0.2)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(place)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    place += len(line)
                    if line.startswith(b"RIG "):
                        told = json.loads(line[4:])
                        self.recorder.add(Sample(at_ns=self.recorder.now_ns(), node=node_id, **told))

    async def _all_voting(self) -> bool:
        api = self.api()
        try:
            reply = await api.call(self.node_ids[0], "GET", "/v1/status", seconds=3)
            self._seen = f"{reply.end} {reply.status} {reply.code}"
            if reply.end != "ok" or not reply.body["quorum"]:
                return False
            roles = {n["id"]: n["role"] for n in reply.body["nodes"]}
            self._seen += f" {roles}"
            return set(roles) == set(self.node_ids) and set(roles.values()) <= {"leader", "follower"}
        finally:
            await api.close()

    # --- small things -----------------------------------------------------------------------------

    async def _until(
        self, true: Callable[[], Awaitable[bool]], seconds: float, what: str, *, quietly: bool = False
    ) -> None:
        until = time.monotonic() + seconds
        while True:
            if await true():
                return
            if time.monotonic() > until:
                if quietly:
                    return
                raise TimeoutError(
                    f"{what}: not within {seconds:.0f} s; seen last: {self._seen or 'nothing'}"
                )
            await asyncio.sleep(0.03)

    async def _cli(self, *words: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *CLI,
            *words,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), 60)
        except TimeoutError:
            raise RuntimeError(f"trimaran {' '.join(words)}: no end within 60 s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise RuntimeError(
                f"trimaran {' '.join(words)}: exit {process.returncode}: {err.decode().strip()}"
            )
        source = self.nodes[self.node_ids[0]].folder / "ca.pem"
        if source.exists():
            shutil.copy(source, self.folder / "ca.pem")
        return out.decode()

    async def _retried(self, act: Callable[[], Awaitable[None]]) -> None:
        """Again and again, as an operator would while the cluster finds a leader."""
        for attempt in range(10):
            try:
                await act()
                return
            except RuntimeError:
                if attempt == 9:
                    raise
                await asyncio.sleep(1)


def fill(path: Path) -> None:
    """Let a file grow until its file system is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for size in (1 << 20, 512):
            with contextlib.suppress(OSError):
                while os.write(descriptor, bytes(size)):
                    pass
    finally:
        os.close(descriptor)
