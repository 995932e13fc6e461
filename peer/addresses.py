"""Under which addresses this peer can be reached, when nobody said.

The addresses of a machine that matter are those from which it reaches its trackers: the kernel is asked which they
are (a connected UDP socket sends nothing), and where that fails all interfaces' names are.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from state_machine import limits


def advertised(scheme: str, host: str, port: int, trackers: Iterable[tuple[str, int]]) -> list[str]:
    """Whole URLs for a peer that listens on `host`. Loopback only when nothing else is there."""
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return [_url(scheme, host, port)]
    found: list[str] = []
    for tracker, tracker_port in trackers:
        local = _towards(tracker, tracker_port)
        if local and local not in found and (":" not in local or host != "0.0.0.0"):  # noqa: S104
            found.append(local)
    outside = [each for each in found if not _loopback(each)]
    chosen = (outside + [each for each in found if _loopback(each)]) or ["127.0.0.1"]
    return [_url(scheme, each, port) for each in chosen[: limits.ADDRESSES_PER_PEER_MAX]]


def _towards(host: str, port: int) -> str:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
