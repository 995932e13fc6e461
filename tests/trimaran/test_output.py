"""What is printed: sizes, times, tables, errors, and names that would like to move the cursor."""

from __future__ import annotations

import orjson
import pytest

from peer.reports import Exit, Progress, SourceReport, State, TrimaranError
from trimaran.output import Output, harmless, lasting, rated, sized
from trimaran.progress import TOLD_AFTER_SECONDS, Display, draw, piece_map_line


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_sizes(count_bytes: int, text: str) -> None:
    assert sized(count_bytes) == text
    assert rated(count_bytes) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.4, "0:00"), (65, "1:05"), (3725, "1:02:05"), (1e9, "-"), (-1, "-")]
)
def test_times(seconds: float | None, text: str) -> None:
    assert lasting(seconds) == text


def test_names_from_others_cannot_steer_the_terminal(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    evil = "a\x1b[2Jb\u202ec\r\nd"
    assert harmless(evil) == "a\\x1b[2Jb\\u202ec\\r\\nd"
    assert harmless("naïve 文件 🚢") == "naïve 文件 🚢"
    Output().table(("NAME", "N"), [(evil, 1), ("[bold]x[/bold]", 20)], empty="-")
    printed = capsysbinary.readouterr().out
    assert b"\x1b" not in printed
    assert b"[bold]x[/bold]" in printed
    assert len(printed.splitlines()) == 3


def test_rows_are_whole_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("A", "B"), [("x" * 300, "y" * 300)], empty="-")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["x" * 300, "y" * 300]


def test_an_empty_table_says_what_to_do_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(("A",), [], empty="Nothing yet.")
    Output(quiet=True).table(("A",), [], empty="Nothing yet.")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "Nothing yet.\n")


def test_answers_are_one_document_a_line(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    source = SourceReport(peer_id="p", bytes=1, pieces=1)
    Output(json=True).answer([source], "never")
    Output(json=True).answer({"revision": 3}, "never")
    first, second = capsysbinary.readouterr().out.splitlines()
    assert orjson.loads(first) == [{"peer_id": "p", "bytes": 1, "pieces": 1, "user": ""}]
    assert orjson.loads(second) == {"revision": 3}


def test_an_error_is_two_lines_or_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    error = TrimaranError(
        "It broke\x07.", exit_code=Exit.CONFLICT, code="conflict", outcome="indefinite", hint="Mend it."
    )
    Output().error(error)
    assert capsys.readouterr() == ("", "error: It broke\\x07. It may have taken effect.\n  Mend it.\n")
    Output(json=True).error(error)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert orjson.loads(printed.err) == {
        "error": {
            "code": "conflict",
            "message": "It broke\x07.",
            "outcome": "indefinite",
            "hint": "Mend it.",
        }
    }


@pytest.mark.parametrize("columns", [20, 80, 100, 200])
@pytest.mark.parametrize("size_bytes", [0, 1 << 30])
def test_progress_never_passes_the_terminals_edge(columns: int, size_bytes: int) -> None:
    from rich.console import Console

    progress = Progress(
        group="crew",
        name="n" * 300,
        state=State.DOWNLOADING,
        done_bytes=size_bytes // 3,
        size_bytes=size_bytes,
        rate_bytes_per_second=1e7,
        seconds_left=61.0,
        peers=3,
        sources=[SourceReport(peer_id=f"{n}" * 52, bytes=n, pieces=n, user="u" * 40) for n in range(9)],
        piece_map="012345678" * 50,
        message="m" * 200,
    )
    console = Console(width=columns, force_terminal=False)
    with console.capture() as captured:
        console.print(draw(progress, columns))
    lines = captured.get().splitlines()
    assert all(len(line.rstrip()) <= columns for line in lines)
    assert len(lines) == (4 if columns >= 100 else 3)


def test_the_piece_map_shows_eighths() -> None:
    assert piece_map_line("08", 10) == " █"
    assert piece_map_line("0088", 2) == " █"
    assert piece_map_line("08" * 100, 50) == "▄" * 50
    assert piece_map_line("", 10) == ""


def test_off_a_terminal_a_line_says_why_it_waits(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0

    def told(state: State, message: str, seconds: float) -> None:
        nonlocal now
        progress = Progress(
            group="crew",
            name="hull\x1b.iso",
            state=state,
            done_bytes=0,
            size_bytes=10,
            rate_bytes_per_second=0.0,
            seconds_left=None,
            peers=0,
            sources=[],
            message=message,
        )
        for _ in range(3):
            display.update(progress)
            now += seconds / 3

    with Display(quiet=False, lines=True, clock=lambda: now) as display:
        told(State.DOWNLOADING, "", 30.0)
        told(State.WAITING, "all peers are busy", TOLD_AFTER_SECONDS / 2)  # over before anybody would care
        told(State.DOWNLOADING, "", 30.0)
        told(State.WAITING, "no peer of this file can be reached", 90.0)
        told(State.WAITING, "the token has expired", 90.0)
        told(State.DOWNLOADING, "", 30.0)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "crew/hull\\x1b.iso waits: no peer of this file can be reached",
        "crew/hull\\x1b.iso waits: the token has expired",
        "crew/hull\\x1b.iso goes on",
    ]
    for display in (
        Display(quiet=True, lines=True, clock=lambda: now),
        Display(quiet=False, clock=lambda: now),
    ):
        with display:
            told(State.WAITING, "all peers are busy", 90.0)
    assert capsys.readouterr().err == ""
