"""One tracker node as a child process of `tracker local`: `python -m cluster.node_process DATA_DIR`.

Says one line of JSON when it serves. Ends on SIGTERM, and when its standard input ends, which is when the
parent is gone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import orjson

from cluster.app import NodeError, Running, run_node
from cluster.config import ConfigError, load_config


def _ready(running: Running) -> None:
    document = {
        "id": running.node_id,
        "http": running.http,
        "raft": running.raft,
        "pid": running.pid,
        "data_dir": str(running.data_dir),
    }
    sys.stdout.write(orjson.dumps(document).decode() + "\n")
    sys.stdout.flush()


def main() -> int:
    try:
        run_node(load_config(Path(sys.argv[1]), environment=os.environ), _ready, stop_with_stdin=True)
    except (ConfigError, NodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
