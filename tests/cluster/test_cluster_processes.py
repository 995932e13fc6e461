"""Three real trackers: what users were told stays true whichever of them dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from tracker_processes import DEADLINE_SECONDS, Trackers, until

from chaos_tests.ports import free_base_port
from cluster.api.client import TrackerClient
from cluster.api.errors import ApiProblem, TrackerError
from cluster.authority import AuthorityError
from cluster.config import load_config
from cluster.founding import init_join
from cluster.joining import Invite

PASSWORD = "correct horse battery"
RECOVERY_SECONDS = 5.0


@pytest.fixture
async def trackers(tmp_path: Path) -> AsyncIterator[Trackers]:
    made = Trackers(tmp_path / "cluster")
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def sign_in(client: TrackerClient, user: str = "ada") -> TrackerClient:
    await client.register(user, PASSWORD)
    return client.as_session((await client.login(user, PASSWORD)).session)


async def group_names(client: TrackerClient) -> set[str]:
    return {group.name for group in (await client.list_groups()).groups}


class Writer:
    """Makes one group after the other, and keeps which were acknowledged and when."""

    def __init__(self, client: TrackerClient, prefix: str = "w") -> None:
        self._client = client
        self._prefix = prefix
        self.acknowledged: list[tuple[float, str]] = []
        self.errors: list[TrackerError] = []
        self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        number = 0
        while True:
            number += 1
            name = f"{self._prefix}{number}"
            try:
                await self._client.create_group(name)
                self.acknowledged.append((time.monotonic(), name))
            except TrackerError as error:
                self.errors.append(error)
            await asyncio.sleep(0.005)

    async def count_above(self, number: int) -> bool:
        return len(self.acknowledged) > number

    async def more(self, number: int) -> None:
        goal = len(self.acknowledged) + number
        await until(lambda: self.count_above(goal), f"{goal} writes, {self.errors[-1:]}")

    async def stop(self) -> set[str]:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        return {name for _, name in self.acknowledged}


async def test_nothing_acknowledged_is_lost(trackers: Trackers) -> None:
    me = await sign_in(trackers.client("n1"))
    # Any node takes anything: made at one, seen at another at once.
    elsewhere = trackers.client("n2").as_session(me._session)
    await elsewhere.create_group("hulls")
    assert "hulls" in await group_names(trackers.client("n3").as_session(me._session))

    # The leader is killed while someone writes.
    writer = Writer(trackers.client().as_session(me._session))
    await writer.more(30)
    leader = await trackers.leader()
    killed_at = time.monotonic()
    await trackers.kill(leader)
    await writer.more(30)
    gap = next(at for at, _ in writer.acknowledged if at > killed_at + 0.2) - killed_at
    assert gap < RECOVERY_SECONDS
    assert not writer.errors, "the client hides the loss of a node"
    others = [node_id for node_id in trackers.configs if node_id != leader]
    assert await trackers.leader() in others

    # Started again, it catches up while writing goes on.
    await trackers.start(leader)
    await writer.more(10)
    names = await writer.stop()
    for node_id in trackers.configs:
        assert await group_names(trackers.client(node_id).as_session(me._session)) >= names | {"hulls"}

    # All at once.
    await trackers.kill(*trackers.configs)
    with pytest.raises(TrackerError):
        await me.within(0.5).whoami()
    await trackers.start()
    for node_id in trackers.configs:
        again = trackers.client(node_id).as_session(me._session)
        assert (await again.whoami()).user == "ada", "sessions outlive the cluster's restart"
        assert await group_names(again) >= names | {"hulls"}


async def test_a_rolling_restart_fails_no_request(trackers: Trackers) -> None:
    me = await sign_in(trackers.client())
    writers = [Writer(me, "a"), Writer(await sign_in(trackers.client(), "bob"), "b")]
    for node_id in trackers.configs:
        await writers[0].more(5)
        assert await trackers.terminate(node_id) == 0
        await writers[0].more(5)
        await trackers.start(node_id)
    await writers[0].more(5)
    names = set()
    for writer in writers:
        names |= await writer.stop()
        assert writer.errors == []
    assert await group_names(me) >= names


async def test_a_fourth_node_joins_by_invite_and_is_removed(trackers: Trackers, tmp_path: Path) -> None:
    me = await sign_in(trackers.client())
    await me.create_group("before")
    operator = trackers.client(operator=True)
    with pytest.raises(ApiProblem) as caught:
        await trackers.client().invite_node("n4", "127.0.0.1:1")
    assert caught.value.status == 403

    port = trackers.base_port + 3
    invite = (await operator.invite_node("n4", f"127.0.0.1:{port + 100}")).invite
    secret = Invite.decode(invite).secret
    for kept in tmp_path.glob("cluster/n*/invites/*"):
        assert secret not in kept.read_text() + kept.name, "the inviter keeps only a hash"
    with pytest.raises(AuthorityError, match="damaged"):
        await init_join(
            invite[:40] + ("A" if invite[40] != "A" else "B") + invite[41:], tmp_path / "x", {}, {}
        )
    flags = {"http": f"127.0.0.1:{port}"}
    folder = trackers.folder / "n4"
    await init_join(invite, folder, flags, {})
    with pytest.raises(ApiProblem, match="used before"):
        await init_join(invite, tmp_path / "thief", flags, {})

    trackers.configs["n4"] = load_config(folder, environment={})
    await trackers.start("n4")
    new = trackers.client("n4").as_session(me._session)
    assert "before" in await group_names(new)
    await new.create_group("through-n4")

    async def counted() -> bool:
        status = await trackers.status("n1")
        return status is not None and any(
            n.id == "n4" and n.role in ("follower", "leader") for n in status.nodes
        )

    await until(counted, "n4 counts")
    # It counts: with one of the first three gone there is still a majority, of three in four.
    await trackers.kill("n1")
    await trackers.client("n2", "n3", "n4").as_session(me._session).create_group("without-n1")
    await trackers.start("n1")

    await operator.within(30).remove_node("n4")
    removed = trackers.processes.pop("n4")
    assert await asyncio.wait_for(removed.wait(), DEADLINE_SECONDS) == 1, "a removed node ends, and says why"
    assert "removed" in (folder / "tracker.log").read_text().splitlines()[-1]
    del trackers.configs["n4"]
    status = await trackers.client("n1", "n2", "n3").status()
    assert sorted(node.id for node in status.nodes) == ["n1", "n2", "n3"]
    assert await group_names(trackers.client().as_session(me._session)) >= {
        "before",
        "through-n4",
        "without-n1",
    }


async def test_a_node_that_is_behind_sends_no_one_away(trackers: Trackers) -> None:
    """What was acknowledged while a node was down is true at that node from its first answer on."""
    await trackers.kill("n3")
    me = await sign_in(trackers.client("n1", "n2"))
    for number in range(200):
        await me.create_group(f"g{number}")
    await trackers.launch("n3")
    late = trackers.client("n3").as_session(me._session)
    assert (await late.whoami()).user == "ada"
    assert len(await group_names(late)) == 200


async def test_one_process_for_one_folder(tmp_path: Path) -> None:
    trackers = Trackers(tmp_path / "cluster", 1)
    try:
        await trackers.start()
        second = subprocess.run(
            [sys.executable, "-m", "cluster.node_process", str(trackers.configs["n1"].data_dir)],
            stdin=subprocess.PIPE,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        assert second.returncode == 1
        assert "already runs" in second.stderr
        assert "Traceback" not in second.stderr
        assert second.stdout == ""
        assert await trackers.terminate("n1") == 0
        (trackers.configs["n1"].data_dir / "raft").rename(tmp_path / "lost")
        third = subprocess.run(
            [sys.executable, "-m", "cluster.node_process", str(trackers.configs["n1"].data_dir)],
            stdin=subprocess.PIPE,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
        assert third.returncode == 1, "a node that lost its log does not vote as its old self"
        assert "Traceback" not in third.stderr
    finally:
        await trackers.close()


_PARENT = """
import asyncio, sys
from pathlib import Path
import orjson
from cluster.local import LocalCluster, prepare

async def main():
    cluster = LocalCluster(
        prepare(Path(sys.argv[1]), 3, int(sys.argv[2]), insecure=True),
        lambda node_id, code: print(node_id, code, file=sys.stderr, flush=True),
    )
    await cluster.start()
    print(orjson.dumps(cluster.document()).decode(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_local_trackers_end_with_their_parent_and_a_dead_one_stays_dead(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PARENT,
        str(tmp_path / "cluster"),
        str(free_base_port(3)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    pids: list[int] = []
    try:
        assert parent.stdout is not None
        assert parent.stderr is not None
        line = await asyncio.wait_for(parent.stdout.readline(), DEADLINE_SECONDS)
        document = orjson.loads(line)
        assert document["ca"] is None
        pids = [node["pid"] for node in document["nodes"]]
        urls = [node["http"] for node in document["nodes"]]
        os.kill(pids[1], signal.SIGKILL)
        said = await asyncio.wait_for(parent.stderr.readline(), DEADLINE_SECONDS)
        assert said.split() == [b"n2", b"-9"]
        async with TrackerClient(urls, insecure=True) as client:
            await client.register("ada", PASSWORD)
        assert not _lives(pids[1])
        parent.kill()
        await parent.wait()

        async def gone() -> bool:
            return not any(_lives(pid) for pid in pids)

        await until(gone, "the children are gone")
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            parent.kill()
        await parent.wait()
