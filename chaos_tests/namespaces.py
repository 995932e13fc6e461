"""The second rig: every tracker in a network namespace of its own, on a bridge; the kernel loses the packets.

Owned here: making and removing the namespaces, and what happens between two nodes, as nftables rules (drop
all, drop some). Unlike a proxy, this loses packets under a TCP connection that lives on, with the kernel's
retransmission and its timeouts. Needs root, `ip` and `nft`; where they are missing, `Unavailable` says so.
Everything happens in namespaces: the machine's own network is not touched (`enter` moves the rig itself).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from chaos_tests.rig import Rig
from chaos_tests.ways import Way

NETWORK = "10.79.0"
BRIDGE_ADDRESS = f"{NETWORK}.254"
CLONE_NEWNET = 0x40000000


class Unavailable(Exception):
    """This machine cannot provide namespaces; the message says why."""


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """A bridge in a namespace of its own, and one namespace for each node. Use as a context."""

    def __init__(self, node_ids: list[str]) -> None:
        self._mark = f"tc{os.getpid() % 10_000}"
        self.bridge = f"{self._mark}br"
        self.hosts = {node_id: f"{NETWORK}.{i}" for i, node_id in enumerate(node_ids, 1)}
        self.names = {node_id: f"{self._mark}{node_id}" for node_id in node_ids}
        self._made: list[str] = []

    def __enter__(self) -> Network:
        """Raises `Unavailable`."""
        if os.geteuid() != 0:
            raise Unavailable("network namespaces need root")
        for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
            if shutil.which(tool) is None:
                raise Unavailable(f"network namespaces need {tool} (Debian: {package})")
        try:
            self._make()
        except Unavailable:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self._add(self.bridge)
        _run("ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self.bridge, "link", "set", "br0", "up")
        _run("ip", "-n", self.bridge, "addr", "add", f"{BRIDGE_ADDRESS}/24", "dev", "br0")
        for number, (node_id, name) in enumerate(self.names.items(), 1):
            self._add(name)
            port = f"v{number}"
            _run(
                "ip", "link", "add", port, "netns", self.bridge, "type", "veth", "peer", "name", "eth0", "netns", name
            )  # fmt: skip
            _run("ip", "-n", self.bridge, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.hosts[node_id]}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            self._nft(node_id, "add table inet rig")
            self._nft(node_id, "add chain inet rig input { type filter hook input priority 0 ; }")
            for other, host in self.hosts.items():
                self._nft(node_id, f"add chain inet rig {other}")
                self._nft(node_id, f"add rule inet rig input ip saddr {host} jump {other}")

    def _add(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        self._made.clear()

    def enter(self) -> None:
        """Move this process (and those it starts from now on) to the bridge. Before any thread is started."""
        with Path(f"/run/netns/{self.bridge}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise Unavailable(f"setns: {os.strerror(ctypes.get_errno())}")

    def prefix(self, node_id: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[node_id]]

    def _nft(self, node_id: str, command: str) -> str:
        return _run(*self.prefix(node_id), "nft", "-j", *command.split(" "))

    def lose(self, source: str, target: str, share: float) -> int:
        """Lose this share of the packets that come from `source` to `target`; returns how many the rule
        before this one lost."""
        lost = self.lost(source, target)
        self._nft(target, f"flush chain inet rig {source}")
        if share >= 1:
            self._nft(target, f"add rule inet rig {source} counter drop")
        elif share > 0:
            rule = f"numgen random mod 1000 < {int(share * 1000)} counter drop"
            self._nft(target, f"add rule inet rig {source} {rule}")
        return lost

    def lost(self, source: str, target: str) -> int:
        told: Any = json.loads(self._nft(target, f"list chain inet rig {source}"))
        rules = [item["rule"] for item in told["nftables"] if "rule" in item]
        return sum(part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part)


class PacketWay(Way):
    """From one node to another, by the packet."""

    def __init__(self, network: Network, source: str, target: str) -> None:
        super().__init__(())
        self._network, self._source, self._target = network, source, target
        self._lost = 0

    def set(self, **faults: float) -> None:
        if unknown := set(faults) - {"held", "loss_chance"}:
            raise ValueError(f"a way by the packet has no fault {sorted(unknown)}")
        share = 1.0 if faults.get("held") else faults.get("loss_chance", 0.0)
        self._lost += self._network.lose(self._source, self._target, share)

    def heal(self) -> None:
        self.set()

    @property
    def bitten(self) -> int:
        return self._lost + self._network.lost(self._source, self._target)


class NamespaceRig(Rig):
    """The same trackers, each on a host of its own."""

    proxied = False

    def __init__(self, network: Network, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self._network = network

    def host(self, node_id: str) -> str:
        return self._network.hosts[node_id]

    def prefix(self, node_id: str) -> list[str]:
        return self._network.prefix(node_id)

    def _places(self, node_id: str) -> list[str]:
        """Users come by the links on the bridge's loopback, which the node's certificate must name."""
        node = self.nodes[node_id]
        return [
            "--http", f"127.0.0.1:{self._user_ports[node_id]}", "--http-listen", f"{node.host}:{node.http}",
            "--raft", f"{node.host}:{node.raft}", "--data-dir", str(node.folder),
        ]  # fmt: skip

    def way(self, a: str, b: str) -> Way:
        return PacketWay(self._network, a, b)

    def dial_places(self, node_id: str) -> dict[str, str]:
        return {}

    def heal(self) -> None:
        super().heal()
        for a in self.node_ids:
            for b in self.node_ids:
                if a != b:
                    self._network.lose(a, b, 0)
