"""Trackers on hosts of their own: what the kernel is told to lose is lost, in that direction alone, and counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from chaos_tests.namespaces import Network, PacketWay, Unavailable

# Nobody listens: a packet that arrives is refused at once, one that is lost is not heard of again.
KNOCK = (
    "import errno, socket, sys\ns = socket.socket()\ns.settimeout(0.5)\n"
    "sys.exit(s.connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)"
)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with Network(["n1", "n2"]) as made:
            yield made
    except Unavailable as reason:
        pytest.skip(str(reason))


def arrives(network: Network, source: str, target: str) -> bool:
    command = [*network.prefix(source), sys.executable, "-c", KNOCK, network.hosts[target]]
    return subprocess.run(command, check=False).returncode == 0


def test_a_held_way_loses_everything_and_counts_it(network: Network) -> None:
    way = PacketWay(network, "n1", "n2")
    assert arrives(network, "n1", "n2") and way.bitten == 0
    way.set(held=True)
    assert not arrives(network, "n1", "n2") and way.bitten > 0
    before = way.bitten
    way.heal()
    assert arrives(network, "n1", "n2") and way.bitten == before


def test_the_other_direction_is_another_way(network: Network) -> None:
    there, back = PacketWay(network, "n1", "n2"), PacketWay(network, "n2", "n1")
    back.set(held=True)
    assert not arrives(network, "n1", "n2"), "the answer is lost"
    assert there.bitten == 0 and back.bitten > 0


def test_a_lossy_way_loses_some(network: Network) -> None:
    way = PacketWay(network, "n1", "n2")
    way.set(loss_chance=0.5)
    came = [arrives(network, "n1", "n2") for _ in range(20)]
    assert way.bitten > 0 and any(came)
