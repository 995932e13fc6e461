"""The folders of `tracker local`: made once, found again, and not confused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.app import NodeError
from cluster.config import ClusterFacts, ConfigError
from cluster.local import LocalCluster, prepare


def test_ports_follow_from_the_base(tmp_path: Path) -> None:
    configs = prepare(tmp_path, 3, 7000, insecure=False)
    assert [config.http for config in configs] == [f"https://127.0.0.1:{7000 + i}" for i in range(3)]
    assert [str(config.raft) for config in configs] == [f"127.0.0.1:{7100 + i}" for i in range(3)]
    facts = [ClusterFacts.load(config.folder) for config in configs]
    assert facts[0] == facts[1] == facts[2]
    assert [node.node_id for node in facts[0].members] == ["n1", "n2", "n3"]
    assert (tmp_path / "ca.pem").read_bytes() == configs[2].folder.ca.read_bytes()
    assert (tmp_path / "operator" / "operator.key").stat().st_mode & 0o777 == 0o600


def test_the_same_folder_is_found_again(tmp_path: Path) -> None:
    first = prepare(tmp_path, 3, 7000, insecure=True)
    assert prepare(tmp_path, 3, 7000, insecure=True) == first


def test_addresses_in_the_environment_are_not_for_them(tmp_path: Path) -> None:
    environment = {"TRIMARAN_HTTP": "elsewhere:1", "TRIMARAN_SERVICE_LEASE_SECONDS": "40"}
    for _ in range(2):
        configs = prepare(tmp_path, 3, 7000, insecure=True, environment=environment)
        assert [config.http for config in configs] == [f"http://127.0.0.1:{7000 + i}" for i in range(3)]
        assert configs[0].service["lease_seconds"] == 40.0


@pytest.mark.parametrize(
    ("nodes", "base_port", "insecure", "words"),
    [(3, 8000, True, "base-port"), (3, 7000, False, "insecure"), (5, 7000, True, "fewer nodes")],
)
def test_another_cluster_in_the_folder_is_refused(
    tmp_path: Path, nodes: int, base_port: int, insecure: bool, words: str
) -> None:
    prepare(tmp_path, 3, 7000, insecure=True)
    with pytest.raises(ConfigError, match=words):
        prepare(tmp_path, nodes, base_port, insecure=insecure)


@pytest.mark.parametrize(("nodes", "base_port"), [(0, 7000), (10, 7000), (3, 0), (3, 65_500)])
def test_impossible_numbers_are_refused(tmp_path: Path, nodes: int, base_port: int) -> None:
    with pytest.raises(ConfigError):
        prepare(tmp_path, nodes, base_port, insecure=True)


async def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if port > 65_000:
            pytest.skip("no room above this port")
        cluster = LocalCluster(prepare(tmp_path, 1, port, insecure=True))
        try:
            with pytest.raises(NodeError, match="in use") as caught:
                await cluster.start()
            assert "n1" in str(caught.value)
        finally:
            await cluster.stop()
