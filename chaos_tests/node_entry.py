"""A tracker node as the rig runs it: the product's own `run_node`, with the rig's hands inside.

    python -m chaos_tests.node_entry --data-dir DIR

From the environment, set by the rig alone: `TRIMARAN_RIG_DIAL` (where to dial other nodes: the proxies),
`TRIMARAN_RIG_CORRECTIONS_OFF` (names of `cluster.raft.corrections` to switch off, to show that the suite
then fails) and `TRIMARAN_RIG_REQUESTS_KEPT` (how many outcomes are remembered). Writes digests of the state, and the terms it leads, as lines `RIG {json}` to standard error. The product has none of
these switches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.app import NodeError, run_node
from cluster.config import ConfigError, load_config
from cluster.consensus import NodeInfo
from cluster.raft.core import RaftCore
from cluster.raft.corrections import ALL
from cluster.raft.messages import AppendEntries, Message
from cluster.raft.transport import Transport
from cluster.service import Service
from state_machine import limits
from state_machine.machine import StateMachine

DIGEST_EVERY_REVISIONS = 25
QUIET_SECONDS = 0.4


def dial_through(places: dict[str, str]) -> None:
    """Dial other nodes at the rig's proxies."""
    plain = Transport.dial

    def dial(self: Transport, node: NodeInfo) -> None:
        plain(self, replace(node, raft=places.get(node.node_id, node.raft)))

    Transport.dial = dial  # type: ignore[method-assign]


def tell_leading() -> None:
    """Tell each term in which this node sends entries as its leader: one leader a term, as seen on the wire."""
    plain = Transport.send
    told = -1

    def send(self: Transport, node_id: str, message: Message) -> bool:
        nonlocal told
        if type(message) is AppendEntries and message.term != told:
            told = message.term
            sys.stderr.write(f'RIG {{"role": "led", "term": {told}}}\n')
            sys.stderr.flush()
        return plain(self, node_id, message)

    Transport.send = send  # type: ignore[method-assign]


def switch_off(names: str) -> None:
    """Take corrections away. Raises `TypeError` for a name that does not exist."""
    corrections = replace(ALL, **dict.fromkeys(names.split(","), False))
    plain = RaftCore.__init__

    def init(self: RaftCore, *words: Any, **named: Any) -> None:
        plain(self, *words, **{**named, "corrections": corrections})

    RaftCore.__init__ = init  # type: ignore[method-assign]


def tell_digests() -> None:
    """Tell the digest every so many revisions (at the end of an entry, so at the same ones on every node),
    and whenever nothing has changed for a moment."""
    plain_apply, plain_start = StateMachine.apply, Service.start

    def apply(self: StateMachine, commands: Sequence[bytes]) -> list[Any]:
        before = self.revision // DIGEST_EVERY_REVISIONS
        results = plain_apply(self, commands)
        if self.revision // DIGEST_EVERY_REVISIONS != before:
            _tell(self)
        return results

    async def start(self: Service) -> None:
        await plain_start(self)
        self._rig = asyncio.create_task(_tell_when_quiet(self.machine))  # type: ignore[attr-defined]

    StateMachine.apply = apply  # type: ignore[method-assign]
    Service.start = start  # type: ignore[method-assign]


async def _tell_when_quiet(machine: StateMachine) -> None:
    told = -1
    while True:
        before = machine.revision
        await asyncio.sleep(QUIET_SECONDS)
        if machine.revision == before and before != told:
            _tell(machine)
            told = before


def _tell(machine: StateMachine) -> None:
    newest = deque(machine.state.requests, maxlen=1)
    line = {
        "role": "", "term": 0, "revision": machine.revision, "digest": machine.digest().hex(),
        "remembered": newest[0].key.hex() if newest else "",
    }  # fmt: skip
    sys.stderr.write(f"RIG {json.dumps(line)}\n")
    sys.stderr.flush()


def remember(requests: int) -> None:
    """Forget outcomes early, so that a long run sees it and its snapshots stay small. The same on all nodes."""
    vars(limits)["REQUESTS_KEPT_MAX"] = requests


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos_tests.node_entry")
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    if places := os.environ.get("TRIMARAN_RIG_DIAL"):
        dial_through(dict(place.split("=", 1) for place in places.split(",")))
    if names := os.environ.get("TRIMARAN_RIG_CORRECTIONS_OFF"):
        switch_off(names)
    if requests := os.environ.get("TRIMARAN_RIG_REQUESTS_KEPT"):
        remember(int(requests))
    tell_digests()
    tell_leading()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_RIG_")}
    try:
        run_node(load_config(options.data_dir, environment=environment), lambda running: None)
    except (ConfigError, NodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
