"""Hosts of a benchmark: this machine's loopback, or network namespaces on a bridge with limited upload.

Where the user is not root, or `ip` is missing, namespaces cannot be made: `Hosts.limited` raises
`Unavailable` with the reason, and the scenario is skipped with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class Unavailable(Exception):
    """This machine cannot provide such hosts; the message says why."""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    prefix: tuple[str, ...] = ()  # what a command is run under


LOOPBACK = Host("loopback", "127.0.0.1")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def limited(
    upload_bytes_per_second: Sequence[int], burst_bytes: int = 128 * 1024
) -> Iterator[tuple[list[Host], Host]]:
    """Hosts on one bridge, each with its own address and upload limit (`tbf`; 0 is unlimited), and one
    more on the bridge itself, unlimited, for trackers."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if not shutil.which("ip") or not shutil.which("tc"):
        raise Unavailable("network namespaces need ip and tc (Debian: iproute2)")
    mark = f"tb{os.getpid() % 10_000}"
    bridge = f"{mark}br"
    made: list[str] = []
    try:
        _ip("netns", "add", bridge)
        made.append(bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        _ip("-n", bridge, "link", "set", "lo", "up")
        _ip("-n", bridge, "addr", "add", "10.77.255.254/16", "dev", "br0")
        hosts = []
        for number, rate in enumerate(upload_bytes_per_second, 1):
            name = f"{mark}n{number}"
            _ip("netns", "add", name)
            made.append(name)
            _ip(
                "link",
                "add",
                f"v{number}",
                "netns",
                bridge,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            _ip("-n", bridge, "link", "set", f"v{number}", "master", "br0", "up")
            address = f"10.77.{number // 250}.{number % 250 + 1}"
            _ip("-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            run = ["ip", "netns", "exec", name]
            subprocess.run(
                [*run, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno"],
                check=False,
                capture_output=True,
            )
            if rate:
                command = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{rate * 8}bit",
                           "burst", str(burst_bytes), "latency", "50ms"]  # fmt: skip
                done = subprocess.run([*run, *command], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
            hosts.append(Host(name, address, tuple(run)))
        yield hosts, Host(bridge, "10.77.255.254", ("ip", "netns", "exec", bridge))
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def quiet_loopback() -> Iterator[Host]:
    """One namespace with its own loopback and reno: the default congestion control may be BBR, which
    costs a quarter on loopback. Falls back to the machine's own loopback."""
    name = f"tblo{os.getpid() % 10_000}"
    if os.geteuid() != 0 or not shutil.which("ip"):
        yield LOOPBACK
        return
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")
    except Unavailable:
        yield LOOPBACK
        return
    run = ("ip", "netns", "exec", name)
    try:
        subprocess.run(
            [*run, "sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno"], check=False, capture_output=True
        )
        yield Host("loopback", "127.0.0.1", run)
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
