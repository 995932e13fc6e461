"""How the cluster's state is shown."""

from __future__ import annotations

import pytest

from cluster.api.types import NodeView, StatusAnswer
from trimaran.cli.cluster import _print
from trimaran.output import Output


def test_a_node_that_does_not_answer_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        NodeView(
            id=f"n{number}",
            address=f"http://h{number}:7000",
            raft=f"h{number}:7100",
            role="leader" if number == 1 else "follower",
            reachable=number != 3,
            applied=7 if number != 3 else 0,
            committed=7 if number != 3 else 0,
        )
        for number in (1, 2, 3)
    ]
    status = StatusAnswer(
        node="n1",
        leader="n1",
        term=2,
        revision=5,
        cluster_id="c",
        quorum=True,
        ready=True,
        nodes=nodes,
        version="1",
    )
    _print(Output(), status)
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows[1][2].split() == ["follower", "yes", "7", "7"]
    assert rows[2][2].split() == ["does", "not", "answer", "NO", "-", "-"]
