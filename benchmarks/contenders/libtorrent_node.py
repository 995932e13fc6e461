"""One libtorrent node, as its own process: `seed|leech TORRENT FOLDER LISTEN PEER,PEER... GO_FILE DONE_FILE`.

Tuned for this work as its authors' guidance and our own trials suggest (the high-performance preset, no
encryption, no uTP, deep request queues, generous unchoking). It starts when GO_FILE appears, and writes
DONE_FILE when everything is on disk.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import libtorrent as lt  # type: ignore[import-not-found]

ALERTS = (
    lt.alert.category_t.status_notification
    | lt.alert.category_t.error_notification
    | lt.alert.category_t.storage_notification
)


def settings(listen: str) -> dict[str, Any]:
    base = dict(lt.high_performance_seed()) if hasattr(lt, "high_performance_seed") else {}
    base.update(
        listen_interfaces=listen, enable_dht=False, enable_lsd=False, enable_upnp=False, enable_natpmp=False,
        allow_multiple_connections_per_ip=True, alert_mask=ALERTS, enable_outgoing_utp=False, enable_incoming_utp=False,
        in_enc_policy=2, out_enc_policy=2, prefer_rc4=False, aio_threads=4, hashing_threads=2, max_out_request_queue=1500,
        max_allowed_in_request_queue=2000, request_queue_time=3, send_buffer_watermark=4 << 20,
        send_buffer_low_watermark=512 << 10, send_buffer_watermark_factor=150, max_queued_disk_bytes=64 << 20,
        unchoke_slots_limit=200, choking_algorithm=0, seed_choking_algorithm=1, mixed_mode_algorithm=0,
        rate_limit_ip_overhead=False, piece_timeout=20, request_timeout=20, torrent_connect_boost=100,
        connection_speed=500, suggest_mode=0, close_redundant_connections=True,
    )  # fmt: skip
    return base


def main() -> None:
    role, torrent, folder, listen, peers, go, done = sys.argv[1:8]
    session = lt.session(settings(listen))
    parameters = lt.add_torrent_params()
    parameters.ti = lt.torrent_info(torrent)
    parameters.save_path = folder
    parameters.flags &= ~lt.torrent_flags.auto_managed
    if role == "seed":
        parameters.flags |= lt.torrent_flags.seed_mode
        parameters.flags &= ~lt.torrent_flags.paused
    else:
        parameters.flags |= lt.torrent_flags.paused
    parameters.flags |= (
        lt.torrent_flags.disable_dht | lt.torrent_flags.disable_lsd | lt.torrent_flags.disable_pex
    )
    handle = session.add_torrent(parameters)
    time.sleep(0.3)
    Path(f"{done}.ready").touch()
    addresses = [
        (address, int(port))
        for address, _, port in (peer.rpartition(":") for peer in peers.split(",") if peer)
    ]
    while not os.path.exists(go):
        time.sleep(0.002)
    if role == "leech":
        handle.resume()
        connect(handle, addresses)
        asked = time.monotonic()
        finished = False
        while not finished:
            session.wait_for_alert(50)
            finished = any(isinstance(alert, lt.torrent_finished_alert) for alert in session.pop_alerts())
            if time.monotonic() - asked > 2:
                asked = time.monotonic()
                if handle.status().num_peers < len(addresses):
                    connect(handle, addresses)
        handle.flush_cache()
        flushed = False
        while not flushed:
            session.wait_for_alert(50)
            flushed = any(isinstance(alert, lt.cache_flushed_alert) for alert in session.pop_alerts())
        Path(done).touch()
    while True:
        time.sleep(1)


def connect(handle: Any, addresses: list[tuple[str, int]]) -> None:
    for address in addresses:
        handle.connect_peer(address)


main()
