"""Whole nodes on real folders and real TLS sockets: nothing is unpickled, and a full disk is survived."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pysyncobj.pickle
import pytest
from test_transport import Credentials, until

from chaos_tests.ports import free_ports
from cluster import tls
from cluster.consensus import Applied, NodeInfo, ProposalEnd, Refusal, Rejected
from cluster.raft.node import RaftNode, open_node
from cluster.raft.settings import RaftSettings


class Commands:
    """A replica that remembers every command."""

    def __init__(self) -> None:
        self.commands: list[bytes] = []

    def apply(self, commands: Sequence[bytes]) -> list[Any]:
        self.commands += commands
        return [len(self.commands)] * len(commands)

    def freeze(self) -> Commands:
        frozen = Commands()
        frozen.commands = list(self.commands)
        return frozen

    def slices(self) -> Iterator[bytes]:
        for command in self.commands:
            yield command + b"\n"

    def loader(self) -> CommandsLoader:
        return CommandsLoader(self)

    def digest(self) -> bytes:
        return b"\n".join(self.commands)


class CommandsLoader:
    def __init__(self, target: Commands) -> None:
        self.target = target
        self.data = b""

    def feed(self, data: bytes) -> None:
        self.data += data

    def work(self) -> bool:
        return False

    def finish(self) -> None:
        self.target.commands = self.data.splitlines()


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = tls.ClusterAuthority.make("c1")
        self.credentials = {
            node_id: Credentials(folder, authority, node_id) for node_id in ("n1", "n2", "n3")
        }
        self.infos = tuple(
            NodeInfo(node_id, f"127.0.0.1:{port}", "http://x", credentials.fingerprint)
            for port, (node_id, credentials) in zip(free_ports(3), self.credentials.items(), strict=True)
        )
        self.nodes: dict[str, RaftNode] = {}
        self.replicas: dict[str, Commands] = {}

    async def start(self, node_id: str) -> None:
        info = next(info for info in self.infos if info.node_id == node_id)
        settings = RaftSettings(
            node=info,
            cluster_id="c1",
            founders=self.infos,
            log_bytes_before_snapshot=20_000,
            keep_tail_bytes=1000,
            segment_bytes=4000,
            snapshot_chunk_bytes=700,
        )
        credentials = self.credentials[node_id]
        self.replicas[node_id] = Commands()
        self.nodes[node_id] = open_node(
            settings,
            self.replicas[node_id],
            data_dir=self.folder / f"{node_id}-data",
            server_tls=credentials.server(),
            client_tls=credentials.client(),
        )
        await self.nodes[node_id].start()

    def leader(self) -> str | None:
        return next((node_id for node_id, node in self.nodes.items() if node.is_leader()), None)

    async def settled(self) -> str:
        await until(lambda: self.leader() is not None, 20)
        leader = self.leader()
        assert leader is not None
        return leader

    async def propose(self, node_id: str, command: bytes) -> ProposalEnd:
        return await self.nodes[node_id].propose(command, deadline_seconds=5)

    async def write(self, *commands: bytes) -> None:
        """Through any node that takes them, in order."""
        for command in commands:
            async with asyncio.timeout(20):
                while not isinstance(await self.propose(await self.settled(), command), Applied):
                    await asyncio.sleep(0.05)

    async def agreed(self) -> None:
        def equal() -> bool:
            return len({self.replicas[node_id].digest() for node_id in self.nodes}) == 1

        await until(equal, 20)


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    for info in made.infos:
        await made.start(info.node_id)
    yield made
    await asyncio.gather(*(node.stop() for node in made.nodes.values()))


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("something was pickled")

    for name in ("loads", "load", "dumps", "dump"):
        monkeypatch.setattr(pysyncobj.pickle, name, forbidden)


async def test_proposals_restarts_and_snapshots_without_a_single_pickle(
    no_pickle: None, three: Cluster
) -> None:
    await three.settled()
    for node_id in three.nodes:
        end = await three.propose(node_id, b"from " + node_id.encode())
        assert isinstance(end, Applied)
    leader = await three.settled()
    behind = next(node_id for node_id in three.nodes if node_id != leader)
    await three.nodes.pop(behind).stop()
    await three.write(*(b"command %d" % number + b"." * 400 for number in range(200)))
    folder = three.folder / f"{leader}-data"
    await until(lambda: any(name.name.endswith(".snap") for name in folder.iterdir()))
    await three.start(behind)  # too far behind for the log: it is sent a snapshot
    await three.write(b"last")
    await three.agreed()
    assert three.replicas[behind].commands[-1] == b"last"
    assert len(three.replicas[behind].commands) >= 204
    assert three.nodes[behind].core.snapshotting.installed >= 1


async def test_a_node_stopped_while_it_receives_a_snapshot_goes_on_with_it(three: Cluster) -> None:
    leader = await three.settled()
    behind = next(node_id for node_id in three.nodes if node_id != leader)
    await three.nodes.pop(behind).stop()
    await three.write(*(b"command %d" % number + b"." * 400 for number in range(200)))
    await until(lambda: any((three.folder / f"{leader}-data").glob("*.snap")))
    folder = three.folder / f"{behind}-data"
    await three.start(behind)

    def part_bytes() -> int:
        return sum(part.stat().st_size for part in folder.glob("*.part"))

    async with asyncio.timeout(20):
        while part_bytes() < 10_000:
            await asyncio.sleep(0)
    await three.nodes.pop(behind).stop()
    assert part_bytes() >= 10_000
    await three.start(behind)
    await three.write(b"last")
    await three.agreed()
    assert three.nodes[behind].core.snapshotting.resumed == 1
    assert part_bytes() == 0


def full_under(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No room for anything in that folder, until the function returned is called."""
    write = os.write

    def failing(descriptor: int, data: memoryview) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(folder):
            if len(data) > 10:
                return write(descriptor, data[:10])  # some of it goes in, as on a real disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    return lambda: monkeypatch.setattr(os, "write", write)


async def test_a_leader_without_room_steps_down_says_so_and_recovers(
    three: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = await three.settled()
    await three.write(*(b"before %d" % number for number in range(5)))
    make_room = full_under(three.folder / f"{full}-data", monkeypatch)
    await three.propose(full, b"finds no room")
    await until(lambda: three.nodes[full].status().disk_full)
    await until(lambda: three.leader() not in (None, full), 20)
    await three.write(*(b"meanwhile %d" % number for number in range(5)))
    end = await three.propose(full, b"through the full one")
    assert isinstance(end, Applied) or (isinstance(end, Rejected) and end.refusal is Refusal.DISK_FULL)
    make_room()
    await until(lambda: not three.nodes[full].status().disk_full)
    await three.write(b"after")
    await three.agreed()
    commands = three.replicas[full].commands
    assert [command for command in commands if command.startswith((b"before", b"meanwhile"))] == [
        *(b"before %d" % number for number in range(5)),
        *(b"meanwhile %d" % number for number in range(5)),
    ]
    # What it holds is on its disk: it comes back by itself with all of it.
    await three.nodes.pop(full).stop()
    await three.start(full)
    await three.agreed()


async def test_a_failed_sync_ends_the_node_and_it_comes_back_with_all_it_promised(
    three: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = await three.settled()
    await three.write(*(b"before %d" % number for number in range(5)))
    reasons: list[str] = []
    three.nodes[failing].on_fatal(reasons.append)
    sync = os.fdatasync
    folder = three.folder / f"{failing}-data"

    def broken(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(folder):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", broken)
    end = await three.propose(failing, b"its sync fails")
    await until(lambda: bool(reasons))
    assert len(reasons) == 1
    assert "disk failed" in reasons[0]
    monkeypatch.setattr(os, "fdatasync", sync)
    await three.nodes.pop(failing).stop()
    await three.write(b"meanwhile")
    await three.start(failing)
    await three.agreed()
    commands = three.replicas[failing].commands
    assert [command for command in commands if command.startswith(b"before")] == [
        b"before %d" % number for number in range(5)
    ]
    if isinstance(end, Rejected):
        # An idle journal seals itself: that sync may have been the one to fail, before this write had begun.
        assert end.refusal is Refusal.STOPPING
        assert b"its sync fails" not in commands
