"""Tracker nodes: three on this machine in one command, or one on each of several hosts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from peer.reports import Exit, TrimaranError
from trimaran.output import Output
from trimaran.settings import DEFAULTS, Common, usage
from trimaran.wiring import as_operator

if TYPE_CHECKING:
    from cluster.config import NodeConfig
    from cluster.local import LocalCluster

app = App(name="tracker", help="Start a cluster of trackers, and run its nodes.")

DataDir = Annotated[str, Parameter(metavar="DIR", help="Where the node keeps its state and keys.")]
Http = Annotated[str, Parameter(metavar="HOST:PORT", help="Where it serves users.")]
Raft = Annotated[str, Parameter(metavar="HOST:PORT", help="Where it serves the other nodes.")]
HttpListen = Annotated[str, Parameter(metavar="HOST:PORT", help="Where it listens for users, if elsewhere.")]
RaftListen = Annotated[str, Parameter(metavar="HOST:PORT", help="Where it listens for nodes, if elsewhere.")]


@app.command
async def local(
    *,
    data_dir: Annotated[
        str, Parameter(metavar="DIR", help="A folder for all nodes; found again the next time.")
    ],
    nodes: Annotated[int, Parameter(help="How many (3).")] = 3,
    base_port: Annotated[int, Parameter(help="HTTP on it and the next ones, Raft 100 above (7000).")] = 7000,
    common: Common = DEFAULTS,
) -> None:
    """Run a whole cluster on this machine: real processes on loopback. Ctrl-C stops them; a dead node stays dead."""
    import asyncio

    from cluster.local import LocalCluster, prepare
    from trimaran.operating import remember_folder

    out = Output.of(common)
    folder = Path(data_dir).expanduser().absolute()

    def died(node_id: str, code: int) -> None:
        out.note(
            f"The node {node_id} died ({_ending(code)}). By hand: trimaran tracker run --data-dir {folder / node_id}"
        )

    cluster = LocalCluster(
        prepare(folder, nodes, base_port, insecure=common.insecure, environment=os.environ), died
    )
    try:
        await cluster.start()
        remember_folder(common, folder)
        out.answer(cluster.document(), lambda: _tell(out, cluster))
        await cluster.all_dead()
    except asyncio.CancelledError:
        return
    finally:
        await cluster.stop()
    raise TrimaranError(
        "All nodes have died.",
        exit_code=Exit.CLUSTER_UNAVAILABLE,
        code="all-dead",
        hint="Start the same command again: what was acknowledged is there.",
    )


@app.command
async def init(
    *,
    data_dir: DataDir,
    node_id: Annotated[str, Parameter(help="The node's id, like n1; with --join the invite's.")] = "",
    http: Http = "",
    raft: Raft = "",
    join: Annotated[
        str, Parameter(metavar="FILE", help="Join with this invite; - reads it from stdin.")
    ] = "",
    http_listen: HttpListen = "",
    raft_listen: RaftListen = "",
    common: Common = DEFAULTS,
) -> None:
    """Make a node's data folder: the first node of a new cluster, or with --join one more.

    The first makes the cluster's CA and the operator's certificate; keep its data folder safe. Then start the node with
    `trimaran tracker run`.
    """
    from cluster.config import ClusterFacts
    from cluster.founding import init_first, init_join
    from trimaran.operating import remember_folder

    flags = _flags(
        node_id=node_id,
        http=http,
        raft=raft,
        http_listen=http_listen,
        raft_listen=raft_listen,
        insecure=common.insecure,
    )
    folder = Path(data_dir).expanduser().absolute()
    if join:
        config = await init_join(_invite_text(join), folder, flags, os.environ)
    else:
        config = init_first(folder, flags, os.environ)
        remember_folder(common, folder)
    ca = None if config.insecure else str(config.folder.ca)
    document = {
        **_document(config),
        "cluster_id": ClusterFacts.load(config.folder).cluster_id,
        "ca": ca,
    }
    out = Output.of(common)
    out.answer(document, f"The node {config.node_id} is made in {config.data_dir}.")
    if ca and not join:
        out.note(f"Users need the CA's certificate: {ca}")
    out.note(f"Start it: trimaran tracker run --data-dir {config.data_dir}")


@app.command
def run(
    *,
    data_dir: DataDir = "",
    http: Http = "",
    raft: Raft = "",
    http_listen: HttpListen = "",
    raft_listen: RaftListen = "",
    log_level: Annotated[str, Parameter(help="debug, info (default), warning or error.")] = "",
    common: Common = DEFAULTS,
) -> None:
    """Run a node until Ctrl-C or SIGTERM; leadership is handed over first. One line is printed when it serves."""
    from cluster.app import Running, run_node
    from cluster.config import load_config

    flags = _flags(
        http=http, raft=raft, http_listen=http_listen, raft_listen=raft_listen, log_level=log_level
    )
    config = load_config(Path(data_dir) if data_dir else None, flags=flags, environment=os.environ)
    out = Output.of(common)

    def ready(_running: Running) -> None:
        out.answer(
            _document(config) | {"pid": os.getpid()},
            f"The node {config.node_id} serves {config.http} (process {os.getpid()}).",
        )

    run_node(config, ready)


@app.command
async def invite(
    node_id: Annotated[str, Parameter(help="The new node's id, like n2.")],
    /,
    *,
    raft: Raft,
    valid_seconds: Annotated[int, Parameter(help="How long it may be used (a day).")] = 86_400,
    data_dir: Annotated[
        str, Parameter(metavar="DIR", help="A running node's data folder, made by init.")
    ] = "",
    operator: Annotated[
        str, Parameter(metavar="DIR", help="Or a folder with the operator's certificate.")
    ] = "",
    common: Common = DEFAULTS,
) -> None:
    """Print an invite for a new node: a single-use, expiring secret. Bring it to the new machine in a safe way."""
    async with as_operator(common, operator or data_dir) as client:
        answer = await client.invite_node(node_id, raft, valid_seconds=valid_seconds)
    Output.of(common).answer({"invite": answer.invite, "revision": answer.revision}, answer.invite)


def _tell(out: Output, cluster: LocalCluster) -> None:
    out.table(
        ("NODE", "USERS", "NODES", "PROCESS", "DATA"),
        [(node.id, node.http, node.raft, node.pid, node.data_dir) for node in cluster.nodes],
        empty="No nodes.",
    )
    ca = f" --ca {cluster.ca}" if cluster.ca is not None else " --insecure"
    out.say(f"Ready. Peers use: --trackers {','.join(node.http for node in cluster.nodes)}{ca}")
    out.say("Ctrl-C stops them.")


def _ending(code: int) -> str:
    import signal

    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _document(config: NodeConfig) -> dict[str, object]:
    return {
        "id": config.node_id,
        "http": config.http,
        "raft": str(config.raft),
        "data_dir": str(config.data_dir),
    }


def _flags(**said: Any) -> dict[str, Any]:
    """What was said; the rest is left to the environment, the node's file and the defaults."""
    return {name: value for name, value in said.items() if value}


def _invite_text(file: str) -> str:
    """The invite, as `tracker invite` printed it, with --json or without."""
    import orjson

    try:
        text = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        usage(
            f"The invite {file} cannot be read: {why}.",
            "Make one on a running node with: trimaran tracker invite NODE --raft HOST:PORT > FILE",
        )
    try:
        return str(orjson.loads(text)["invite"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return text
