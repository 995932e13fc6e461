"""What the rig says of a node, by processes that behave in each way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from chaos_tests import rig as rigs
from chaos_tests.history import Recorder

REFUSES = "import time; time.sleep(0.5); print('It is damaged, so it must not start.'); raise SystemExit(1)"
SERVES = "import time; time.sleep(60)"
CRASHES = "raise SystemExit(3)"


class Pretending(rigs.Rig):
    """Its nodes run a program of the test's own, and listen from the first moment."""

    program = ""

    async def start(self, node_id: str, environment: Mapping[str, str] | None = None) -> None:
        node = self.nodes[node_id]
        with node.log.open("ab") as log:
            node.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", self.program, stdout=log, stderr=log
            )


@pytest.mark.parametrize(
    ("program", "wrong"), [(REFUSES, ""), (SERVES, "it serves"), (CRASHES, "it ended with 3")]
)
async def test_a_node_that_listens_before_it_refuses_has_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, wrong: str
) -> None:
    monkeypatch.setattr(rigs, "REFUSED_SECONDS_MAX", 0.3 if program == SERVES else 10.0)
    rig = Pretending(tmp_path, Recorder(None, 1), 1, 1)
    rig.program = program
    rig.nodes["n1"] = node = rigs.Node("n1", tmp_path / "n1", "127.0.0.1", 1, 2)
    node.log.touch()
    try:
        did = await rig.refuses_to_start("n1")
        assert did.startswith(wrong) and bool(did) == bool(wrong)
    finally:
        await rig.kill("n1")
