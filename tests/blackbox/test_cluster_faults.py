"""The cluster loses nodes, all of them, and gains one; what was acknowledged is there."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import Cluster, Person, Process, run, running_cluster, wait_for

from chaos_tests.ports import free_base_port


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path) as cluster:
        yield cluster


def test_the_leader_dies_then_all_and_nothing_acknowledged_is_lost(fresh: Cluster, tmp_path: Path) -> None:
    ana = Person(fresh, tmp_path / "ana", "ana")
    ana.ok("register", "ana")
    ana.ok("group", "create", "before")
    dead = fresh.kill_leader()
    ana.ok("group", "create", "during")
    status = wait_for(lambda: (s := fresh.status())["leader"] not in (None, dead) and s, "a new leader")
    assert status["quorum"] is True
    # the dead node comes back by hand, and catches up
    (data_dir,) = [node["data_dir"] for node in fresh.nodes if node["id"] == dead]
    back = Process(["tracker", "run", "--data-dir", data_dir], {})
    try:
        wait_for(
            lambda: (
                all(node["reachable"] for node in fresh.status()["nodes"])
                and len({node["applied"] for node in fresh.status()["nodes"]}) == 1
            ),
            "the node to catch up",
        )
    finally:
        assert back.stop() == 0
    # all are killed, and started again
    import os

    for node in fresh.nodes:
        if node["id"] != dead:
            os.kill(node["pid"], signal.SIGKILL)
    assert fresh.process.process.wait(20) == 6
    fresh.process.process.communicate()
    ana.refused(6, "group", "list")
    fresh.start()
    assert {each["name"] for each in ana.ok("group", "list")} == {"before", "during"}


def test_a_node_joins_by_invite_and_leaves(tmp_path: Path) -> None:
    port = free_base_port(3)
    first, second = tmp_path / "one", tmp_path / "two"
    home = {"TRIMARAN_HOME": str(tmp_path / "home")}
    made = run(
        *("tracker", "init", "--node-id", "n1", "--http", f"127.0.0.1:{port}"),
        *("--raft", f"127.0.0.1:{port + 100}", "--data-dir", str(first)),
        environment=home,
    )
    assert made.code == 0, made
    again = run(
        "tracker",
        "init",
        "--node-id",
        "n1",
        "--http",
        "h:1",
        "--raft",
        "h:2",
        "--data-dir",
        str(first),
        environment=home,
    )
    assert again.code == 2, again
    one = Process(["tracker", "run", "--data-dir", str(first)], {})
    two: Process | None = None
    try:
        invite = run(
            "tracker", "invite", "n2", "--raft", f"127.0.0.1:{port + 101}", environment=home, as_json=False
        )
        assert invite.code == 0, invite
        file = tmp_path / "n2.invite"
        file.write_text(invite.out)
        joined = run(
            *(
                "tracker",
                "init",
                "--join",
                str(file),
                "--http",
                f"127.0.0.1:{port + 1}",
                "--data-dir",
                str(second),
            ),
            environment=home,
        )
        assert joined.code == 0, joined
        two = Process(["tracker", "run", "--data-dir", str(second)], {})
        trackers = {"TRIMARAN_TRACKERS": f"https://127.0.0.1:{port}", "TRIMARAN_CA": str(first / "ca.pem")}

        def roles() -> dict[str, str]:
            status = run("cluster", "status", environment=trackers).json
            return {node["id"]: node["role"] for node in status["nodes"]}

        wait_for(lambda: roles() == {"n1": "leader", "n2": "follower"}, "the new node")
        # the invite is for one use
        third = run(
            *("tracker", "init", "--join", str(file), "--http", f"127.0.0.1:{port + 2}"),
            *("--data-dir", str(tmp_path / "three")),
            environment=home,
        )
        assert third.code in (2, 4, 5), third
        removed = run("cluster", "remove", "n2", environment=home)
        assert removed.code == 0, removed
        wait_for(lambda: set(roles()) == {"n1"}, "the node to be gone")
    finally:
        if two is not None:
            two.kill()
        one.stop()
