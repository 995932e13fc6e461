"""`python -m benchmarks.trackers FOLDER HOST BASE_PORT [insecure]`: three trackers on one address of this
machine, which need not be loopback: hosts in network namespaces cannot reach another's loopback.

Says what `tracker local` says, and ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

from cluster import local


async def main() -> None:
    folder, host, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    local.HOST = host
    nodes = local.prepare(folder, 3, port, insecure="insecure" in sys.argv[4:])
    cluster = local.LocalCluster(nodes, lambda node, code: None)
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await cluster.start()
    print(json.dumps(cluster.document()), flush=True)
    try:
        await ending.wait()
    finally:
        await cluster.stop()


asyncio.run(main())
