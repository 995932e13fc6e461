"""Several real trackers on this machine: what `tracker local` and the demo run.

Owned here: the folders under one data folder (`n1`, `n2`, ...), the child processes, and their end. Each
node is a process of its own on its own folder, made once and found again. A node that dies stays dead
(`trimaran tracker run --data-dir DIR/n2` brings it back by hand); when this process goes, in whatever
way, the children go too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from cluster.api.certificates import write_durably
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError
from cluster.app import NodeError
from cluster.config import PREFIX, ConfigError, DataFolder, NodeConfig, load_config, parse_config
from cluster.founding import found

HOST = "127.0.0.1"
RAFT_PORT_OFFSET = 100
NODES_MAX = 9
READY_SECONDS = 30.0
STOP_SECONDS = 8.0
POLL_SECONDS = 0.05

Died = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class LocalNode:
    id: str
    http: str
    raft: str
    pid: int
    data_dir: Path

    def document(self) -> dict[str, object]:
        return {
            "id": self.id,
            "http": self.http,
            "raft": self.raft,
            "pid": self.pid,
            "data_dir": str(self.data_dir),
        }


def prepare(
    data_dir: Path,
    nodes: int,
    base_port: int,
    *,
    insecure: bool,
    environment: Mapping[str, str] | None = None,
) -> list[NodeConfig]:
    """Make the nodes' folders, or find those made before. Raises `ConfigError`.

    HTTP is on `base_port + i`, Raft on `base_port + 100 + i`, i from 0."""
    if not 1 <= nodes <= NODES_MAX:
        raise ConfigError(f"--nodes must be 1 to {NODES_MAX}, not {nodes}", field="nodes")
    if not 1 <= base_port <= 65_535 - RAFT_PORT_OFFSET - nodes:
        raise ConfigError(
            f"--base-port must leave room below 65536 for all ports, not {base_port}", field="base_port"
        )
    root = data_dir.expanduser().absolute()
    folders = [DataFolder(root / f"n{number}") for number in range(1, nodes + 1)]
    tunables = _tunables(environment or {})
    if all(folder.cluster.exists() for folder in folders):
        return _found_again(folders, base_port, insecure=insecure, environment=tunables)
    return _made(root, folders, base_port, insecure=insecure, environment=tunables)


def _tunables(environment: Mapping[str, str]) -> dict[str, str]:
    """What may be set for all nodes at once. Addresses and names are each node's own: a TRIMARAN_HTTP
    that is meant for another program must not move three nodes onto one port."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(PREFIX)
        or name.startswith(
            (PREFIX + "SERVICE_", PREFIX + "RAFT_SETTINGS_", PREFIX + "KILL_", PREFIX + "LOG_")
        )
    }


def _flags(number: int, base_port: int, *, insecure: bool) -> dict[str, object]:
    return {
        "node_id": f"n{number}",
        "http": f"{HOST}:{base_port + number - 1}",
        "raft": f"{HOST}:{base_port + RAFT_PORT_OFFSET + number - 1}",
        "insecure": insecure,
    }


def _made(
    root: Path, folders: list[DataFolder], base_port: int, *, insecure: bool, environment: Mapping[str, str]
) -> list[NodeConfig]:
    if any(folder.cluster.exists() for folder in folders):
        raise ConfigError(
            f"{root} holds a cluster of fewer nodes; run it with as many as it was made with, "
            "or give another folder",
            field="nodes",
        )
    configs = [
        parse_config(folder.path, flags=_flags(number, base_port, insecure=insecure), environment=environment)
        for number, folder in enumerate(folders, start=1)
    ]
    root.mkdir(parents=True, exist_ok=True)
    found(configs)
    if not insecure:
        first = folders[0]
        write_durably(root / "ca.pem", first.ca.read_bytes())
        shutil.copytree(first.operator.parent, root / "operator", dirs_exist_ok=True)
    return configs


def _found_again(
    folders: list[DataFolder], base_port: int, *, insecure: bool, environment: Mapping[str, str]
) -> list[NodeConfig]:
    configs = [load_config(folder.path, environment=environment) for folder in folders]
    for number, config in enumerate(configs, start=1):
        wanted = parse_config(
            config.data_dir, flags=_flags(number, base_port, insecure=insecure), environment={}
        )
        if (config.http, config.raft) != (wanted.http, wanted.raft):
            raise ConfigError(
                f"{config.data_dir} was made for {config.http} and Raft on {config.raft}; "
                "start it with the same --base-port and --insecure, or give another folder",
                field="base_port",
            )
    return configs


def log_file(config: NodeConfig) -> Path:
    return config.data_dir / "tracker.log"


def _ended(config: NodeConfig, code: int) -> NodeError:
    lines = log_file(config).read_text(errors="replace").splitlines()[-1:]
    said = f": {lines[0]}" if lines else ""
    return NodeError(f"tracker {config.node_id} ended with code {code} before it was ready{said}")


class LocalCluster:
    """The running children. `start()`, then `stop()` in every case."""

    def __init__(self, configs: list[NodeConfig], died: Died = lambda node_id, code: None) -> None:
        self._configs = configs
        self._died = died
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self.nodes: list[LocalNode] = []

    @property
    def ca(self) -> Path | None:
        config = self._configs[0]
        return None if config.insecure else config.data_dir.parent / "ca.pem"

    def document(self) -> dict[str, object]:
        """The first line of `tracker local`."""
        return {
            "nodes": [node.document() for node in self.nodes],
            "ca": str(self.ca) if self.ca is not None else None,
        }

    async def start(self, *, ready_seconds: float = READY_SECONDS) -> None:
        """Returns when all nodes serve and agree on a leader. Raises `NodeError`."""
        try:
            async with asyncio.timeout(ready_seconds):
                self.nodes = list(await asyncio.gather(*(self._start(config) for config in self._configs)))
                await asyncio.gather(*(self._until_ready(node) for node in self.nodes))
        except TimeoutError:
            raise NodeError(
                f"the trackers did not become ready within {ready_seconds:g} s; see {log_file(self._configs[0])} "
                "and those of the other nodes"
            ) from None

    async def _start(self, config: NodeConfig) -> LocalNode:
        with log_file(config).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.node_process",
                str(config.data_dir),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # Ctrl-C on the terminal reaches this process alone, which then stops them in order.
                start_new_session=True,
                env={**_tunables(os.environ), "PYTHONUNBUFFERED": "1"},
            )
        self._processes[config.node_id] = process
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise _ended(config, await process.wait())
        said = orjson.loads(line)
        self._watchers[config.node_id] = asyncio.create_task(self._watch(config.node_id, process))
        return LocalNode(said["id"], said["http"], said["raft"], said["pid"], Path(said["data_dir"]))

    async def _watch(self, node_id: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        if not self._stopping:
            self._died(node_id, code)

    async def _until_ready(self, node: LocalNode) -> None:
        insecure = self._configs[0].insecure
        async with TrackerClient([node.http], ca=self.ca, insecure=insecure) as client:
            while True:
                with suppress(TrackerError):
                    if (await client.within(2.0).status(at=node.http)).ready:
                        return
                process = self._processes[node.id]
                if process.returncode is not None:
                    raise NodeError(
                        f"tracker {node.id} ended with code {process.returncode} before it was ready"
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def all_dead(self) -> None:
        """Returns when no child is left."""
        await asyncio.gather(*self._watchers.values())

    async def stop(self) -> None:
        """One after the other, the last first; each finishes what it has in work."""
        self._stopping = True
        for process in reversed(list(self._processes.values())):
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.terminate()
                try:
                    async with asyncio.timeout(STOP_SECONDS):
                        await process.wait()
                except TimeoutError:
                    with suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
