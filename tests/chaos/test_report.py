"""The report is one file, names what went wrong, and escapes what strangers may have put into it."""

from __future__ import annotations

from pathlib import Path

from chaos_tests import history as h
from chaos_tests import report
from chaos_tests.checkers.verdict import held, violated


def test_a_violation_is_shown_with_its_operations(tmp_path: Path) -> None:
    operations = [
        h.Operation(
            id=i, client="c<1>", name="replace", key="file:g:f", node="n1", input=f"v{i}", call_ns=i * 10**8,
            deadline_ns=10**10, end="ok", end_ns=i * 10**8 + 5, output="", revision=i,
        )
        for i in range(3)
    ]  # fmt: skip
    history = h.History(
        seed=9, operations=operations, faults=[h.Fault(kind="kill", target="n2", begin_ns=0, end_ns=10**8, bit=True)],
        samples=[h.Sample(at_ns=5, node="n1", role="leader", term=2)], end_ns=10**9, healed_ns=9 * 10**8,
        transfers=[h.Transfer(peer="p1", group="g", name="f", begin_ns=0, end_ns=10**8, size_bytes=10, progress=[(0, 1)])],
        lives=[h.Life(peer="p1", peer_id="x", from_ns=0, to_ns=h.FOREVER_NS)],
    )  # fmt: skip
    path = tmp_path / "report.html"
    verdicts = [held("one leader per term", 1), violated("linearizability", 3, "bad <b>", 10**8, [0, 2])]
    report.write(
        path, history, verdicts, title="run 9", replay="make chaos SEED=9", figures={"operations": "3"}
    )
    text = path.read_text()
    assert "1 of 2 checks did not hold" in text
    assert "make chaos SEED=9" in text
    assert "n1 leads term 2" in text
    assert "p1 can be reached" in text and "p1 gets f: did not end well" in text
    assert "bad &lt;b&gt;" in text and "bad <b>" not in text
    assert "http://" not in text and "https://" not in text and "src=" not in text
