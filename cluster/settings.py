"""What can be set about the tracker service: one frozen struct, with the defaults and why they are so.

Owned here: names, units, defaults and the checks between them. Left to `cluster/config.py`: where the
values come from (flags, environment, file).
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct


class ServiceSettings(Struct, frozen=True, kw_only=True):
    """Everything `Service` needs to know but the state itself. Units stand last in the names."""

    cluster_id: str
    data_dir: Path  # the node's signing keys lie in `data_dir / "signing"`, readable by its user alone
    version: str = "0.1.0"
    insecure: bool = False  # plain HTTP: no certificates, operators are callers from this machine

    # Deadlines. Shorter than a client's patience, longer than an election.
    propose_seconds: float = 5.0
    read_seconds: float = 1.5
    body_seconds: float = 20.0  # a whole body must have arrived by then
    membership_seconds: float = 60.0

    # Bounds on what may wait here.
    connections_max: int = 30_000
    silent_seconds: float = 15.0  # a connection's first request must have come by then
    idle_seconds: float = 75.0  # then a connection that asks for nothing any more is closed
    requests_max: int = 4_096  # in work at once; more are told to come back
    body_bytes_max: int = 256 * 1024
    announce_body_bytes_max: int = 8 << 20

    # Rights.
    session_seconds: float = 30 * 86_400
    token_seconds: float = 30 * 60
    skew_seconds: float = 60.0  # how far the clocks of nodes and peers may be apart
    signing_key_seconds: float = 7 * 86_400  # then the node makes itself a new one
    attempts_per_account: int = 10  # failed sign-ins from one address within `attempts_seconds`
    attempts_per_address: int = 100
    attempts_seconds: float = 300.0
    hash_threads: int = 1  # argon2id takes a core and 19 MiB each while it works
    hash_queue_max: int = 64
    hash_memory_kib: int = 19_456  # OWASP's first recommendation for argon2id: 19 MiB, 2 passes, 1 lane
    hash_passes: int = 2

    # Leases and announcements.
    lease_seconds: float = 30.0
    announce_seconds: float = 10.0  # three chances before a lease ends
    announce_window_seconds: float = 0.03  # announcements within it share one entry
    renew_seconds: float = 3.0  # each node renews the peers it heard from this often
    prune_seconds: float = 600.0

    # Watch.
    heartbeat_seconds: float = 0.25
    heartbeat_quorum_seconds: float = 0.5  # no heartbeat once a quorum was last heard longer ago
    watchers_max: int = 20_000
    watch_queue_bytes_max: int = 1 << 20
    watch_kept_changes_max: int = 100_000
    watch_kept_bytes_max: int = 64 << 20
    watch_ahead_seconds: float = 3.0  # how long a resumed stream waits for this node to catch up

    def __post_init__(self) -> None:
        if self.announce_seconds >= self.lease_seconds:
            raise ValueError("announce_seconds must be shorter than lease_seconds")
        if self.renew_seconds >= self.lease_seconds:
            raise ValueError("renew_seconds must be shorter than lease_seconds")
        if self.token_seconds <= 0 or self.session_seconds <= 0:
            raise ValueError("token_seconds and session_seconds must be positive")
