"""The command as a process: help, usage errors, the last resort, signals, and how long it takes to begin."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import orjson
import pytest

from chaos_tests.ports import free_base_port
from peer.reports import Exit, TrimaranError
from peer.trouble import sentence
from trimaran.cli import main as front
from trimaran.cli.app import _COMMANDS, build


def trimaran(
    *argv: str, home: Path, environment: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
    return subprocess.run(
        [sys.executable, "-m", "trimaran", *argv],
        input=stdin,
        capture_output=True,
        env=kept | {"TRIMARAN_HOME": str(home)} | dict(environment or {}),
        timeout=60,
        check=False,
    )


def test_alone_without_a_terminal_it_prints_help(tmp_path: Path) -> None:
    done = trimaran(home=tmp_path)
    assert done.returncode == Exit.USAGE
    assert done.stdout.startswith(b"Usage: trimaran")
    assert b"group" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    "argv", [("--help",), ("-h",), ("get", "--help"), ("group", "-h"), ("group", "kick", "-h")]
)
def test_help_is_an_answer(tmp_path: Path, argv: tuple[str, ...]) -> None:
    done = trimaran(*argv, home=tmp_path)
    assert (done.returncode, done.stderr) == (Exit.DONE, b"")
    assert done.stdout.startswith(b"Usage: trimaran")


def test_the_version(tmp_path: Path) -> None:
    assert re.fullmatch(rb"trimaran \d+\.\d+\.\d+\n", trimaran("--version", home=tmp_path).stdout)


@pytest.mark.parametrize(
    "argv",
    [
        ("nonsense",),
        ("group", "nonsense"),
        ("get",),
        ("get", "no-slash"),
        ("get", "g/n", "--down", "fast"),
        ("get", "g/n", "--nonsense"),
        ("files",),
        ("files", "a", "b"),
        ("share", "x"),
        ("ps", "--trackers", "https://a:99999"),
        ("ps",),  # no trackers are known
        ("register", "ana", "--trackers", "ftp://a:1"),
        ("login", "ana", "--trackers", "http://127.0.0.1:1"),  # plain, without --insecure
        ("tracker", "run"),
        ("tracker", "run", "--data-dir", "/nowhere"),
        ("tracker", "init", "--data-dir", "/proc/nowhere", "--node-id", "N 1"),
        ("tracker", "local", "--data-dir", "/tmp/never-made", "--nodes", "0"),
        ("cluster", "watch", "--interval-seconds", "0", "--trackers", "a:1"),
        ("peer", "limits", "--up", "-5M", "--trackers", "a:1"),
        ("peer", "limits", "--up", "9" * 400, "--trackers", "a:1"),
        ("peer", "limits", "--up-each", "5 apples", "--trackers", "a:1"),
        ("peer", "limits", "--up-each", "1K", "--trackers", "a:1"),
        ("peer", "limits", "--slots", "65", "--trackers", "a:1"),
        ("peer", "limits", "--slots", "-1", "--trackers", "a:1"),
        ("peer", "limits", "--slots", "few", "--trackers", "a:1"),
    ],
)
def test_usage_errors_are_2_and_name_what_is_wrong(
    tmp_path: Path,
    argv: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRIMARAN_PASSWORD", "long enough")
    monkeypatch.setenv("TRIMARAN_HOME", str(tmp_path))
    assert front.dispatch(argv) == Exit.USAGE
    for_people = capsys.readouterr()
    assert for_people.out == ""
    assert for_people.err.startswith("error: ")
    assert len(for_people.err.splitlines()) <= 2
    assert front.dispatch([*argv, "--json"]) == Exit.USAGE
    for_scripts = capsys.readouterr()
    assert for_scripts.out == ""
    error = orjson.loads(for_scripts.err)["error"]
    assert error.keys() == {"code", "message", "outcome", "hint"}
    assert error["outcome"] == "definite"
    assert error["message"]


@pytest.mark.parametrize(
    ("argv", "message", "hint"),
    [
        (("register",), "`trimaran register` needs USER.", "See: trimaran register --help"),
        (("share", "x"), "`trimaran share` needs --group.", "See: trimaran share --help"),
        (("grup",), 'Unknown command "grup". Did you mean "group"?', "See: trimaran --help"),
        (("zzz",), 'Unknown command "zzz".', "See: trimaran --help"),
        (("group", "creat"), 'Unknown command "creat". Did you mean "create"?', "See: trimaran group --help"),
        (
            ("peer", "zzz"),
            'Unknown command "zzz". `trimaran peer` knows: run, limits.',
            "See: trimaran peer --help",
        ),
        (("--quiet", "peer"), "`trimaran peer` needs a verb: run, limits.", "See: trimaran peer --help"),
        (
            ("get", "a/b", "--dwn", "1"),
            "Unknown option: --dwn. Did you mean --down?",
            "See: trimaran get --help",
        ),
        (("get", "a/b", "--down"), "--down needs a value.", "See: trimaran get --help"),
        (("--quiet", "--versio"), "There is no verb among these words.", "See: trimaran --help"),
        (("files", ""), 'Invalid value "" for GROUP. A name cannot be empty.', "See: trimaran files --help"),
        (
            ("files", "g", "--trackers", "https://127.0.0.1:1", "--ca", "/nowhere.pem"),
            "Cannot use /nowhere.pem as the cluster's CA: No such file or directory.",
            "Name the cluster's CA with --ca FILE (or TRIMARAN_CA): it is the ca.pem in a tracker's data folder.",
        ),
        (
            ("register", "ana", "--trackers", "https://127.0.0.1:1"),
            "A password has at least 8 characters; this one has 5.",
            "Nothing was done. Choose a longer one.",
        ),
    ],
)
def test_a_mistake_is_named_with_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    monkeypatch.setenv("TRIMARAN_HOME", str(tmp_path))
    monkeypatch.setenv("TRIMARAN_PASSWORD", "short")
    (tmp_path / "session.json").write_text('{"user":"ana","session":"x","expires_at":"2100-01-01T00:00:00Z"}')
    assert front.dispatch(argv) == Exit.USAGE
    assert capsys.readouterr().err.splitlines() == [f"error: {message}", f"  {hint}"]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("the name is taken", "The name is taken."),
        ("'ana' is no member", "'ana' is no member."),
        ("https://host:1 is not encrypted", "https://host:1 is not encrypted."),
        (
            "nothing was changed; see `trimaran x`, and go on",
            "Nothing was changed; see `trimaran x`, and go on.",
        ),
        ("this is not made by `trimaran tracker invite`", "This is not made by `trimaran tracker invite`."),
        ("See all groups: trimaran group list", "See all groups: trimaran group list"),
        ("", ""),
    ],
)
def test_what_a_person_reads_is_a_sentence(said: str, told: str) -> None:
    assert sentence(said) == told


def test_the_environment_asks_for_json_too(tmp_path: Path) -> None:
    done = trimaran("get", "no-slash", home=tmp_path, environment={"TRIMARAN_JSON": "1"})
    assert orjson.loads(done.stderr)["error"]["code"] == "usage"


def test_a_dead_cluster_is_6(tmp_path: Path) -> None:
    done = trimaran(
        "cluster", "status", "--json", "--trackers", "http://127.0.0.1:1", "--insecure", home=tmp_path
    )
    assert (done.returncode, done.stdout) == (Exit.CLUSTER_UNAVAILABLE, b"")
    error = orjson.loads(done.stderr)["error"]
    assert error["outcome"] == "definite"
    assert error["message"] == (
        "No tracker could answer: http://127.0.0.1:1: no connection (Connection refused)."
    )
    assert "cluster status" not in error["hint"], "that is what was just run"


def test_nobody_signed_in_is_4(tmp_path: Path) -> None:
    done = trimaran(
        "group", "list", "--json", "--trackers", "http://127.0.0.1:1", "--insecure", home=tmp_path
    )
    assert done.returncode == Exit.DENIED
    assert b"trimaran login" in done.stderr


def test_what_nobody_expected_leaves_a_log_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_argv: list[str]) -> int:
        raise ZeroDivisionError("by a test")

    monkeypatch.setattr(front, "_run", broken)
    assert front.dispatch(["ps", "--home", str(tmp_path)]) == Exit.UNEXPECTED
    printed = capsys.readouterr()
    (log,) = tmp_path.glob("crash-*.log")
    assert "ZeroDivisionError: by a test" in log.read_text()
    assert str(log) in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert "It may have taken effect" in printed.err


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted"),
        (OSError(28, "No space left on device"), Exit.NO_SPACE, "no-space"),
        (FileNotFoundError(2, "No such file", "x"), Exit.NOT_FOUND, "no-such-path"),
        (PermissionError(13, "Permission denied", "x"), Exit.DENIED, "no-permission"),
        (OSError(98, "Address already in use"), Exit.CONFLICT, "address-in-use"),
        (
            ExceptionGroup(
                "several",
                [
                    ValueError("x"),
                    ExceptionGroup("y", [TrimaranError("z", exit_code=Exit.INTEGRITY, code="i")]),
                ],
            ),
            Exit.INTEGRITY,
            "i",
        ),
    ],
)
def test_each_failure_has_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    exit_code: Exit,
    code: str,
) -> None:
    def failing(_argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(front, "_run", failing)
    assert front.dispatch(["ps", "--json", "--home", str(tmp_path)]) == exit_code
    assert orjson.loads(capsys.readouterr().err)["error"]["code"] == code


def test_a_reader_that_went_away_is_no_traceback(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "trimaran", "get", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=kept | {"TRIMARAN_HOME": str(tmp_path)},
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert not list(tmp_path.glob("crash-*"))


def test_every_verb_of_the_contract_is_there() -> None:
    app = build()
    contract = """
        demo register login logout whoami passwd share unshare remove files info get ps pause resume cancel verify
        group/create group/list group/show group/join group/leave group/withdraw group/requests group/accept
        group/reject group/members group/kick group/promote group/demote group/transfer group/delete group/log
        peer/run peer/limits tracker/local tracker/init tracker/invite tracker/run
        cluster/status cluster/watch cluster/add cluster/remove cluster/transfer
    """
    for path in contract.split():
        found = app
        for name in path.split("/"):
            found = found[name]
        assert found.default_command is not None, path


def test_the_listed_sentences_are_the_docstrings_own() -> None:
    for name, _, _, about in _COMMANDS:
        verb = build(name)[name]
        whole = verb.help if not verb.default_command else (verb.default_command.__doc__ or "")
        assert " ".join(whole.split("\n\n")[0].split()).startswith(about.removesuffix(".")), name


def test_the_command_begins_quickly(tmp_path: Path) -> None:
    """In CPU seconds, so that a busy machine does not decide; the least of several runs."""

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        trimaran("--help", home=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu_seconds()
    assert min(cpu_seconds() for _ in range(5)) < 0.5
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trimaran", "--help"],
        capture_output=True,
        timeout=60,
        check=True,
    ).stderr
    for heavy in (b"aiohttp", b"cryptography", b"msgspec", b"cluster.api", b"asyncio"):
        assert b" " + heavy not in loaded, heavy


def test_sigterm_ends_a_cluster_tidily_whatever_is_sent_twice(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIMARAN_")}
    port = free_base_port(1)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "trimaran", "tracker", "local", "--nodes", "1", "--json"),
            *("--data-dir", str(tmp_path / "c"), "--base-port", str(port)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=kept | {"TRIMARAN_HOME": str(tmp_path)},
    )
    assert process.stdout is not None
    ready = orjson.loads(process.stdout.readline())
    (node,) = ready["nodes"]
    assert node.keys() >= {"id", "http", "raft", "pid", "data_dir"}
    assert (node["http"], node["raft"]) == (f"https://127.0.0.1:{port}", f"127.0.0.1:{port + 100}")
    assert ready["ca"] == str(tmp_path / "c" / "ca.pem")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (Exit.DONE, b"")
    with pytest.raises(ProcessLookupError):
        os.kill(node["pid"], 0)


def test_in_the_background_of_a_script_it_can_be_interrupted(tmp_path: Path) -> None:
    """A shell without job control starts `command &` with SIGINT ignored; `kill -INT` must end it all the same."""
    port = free_base_port(1)
    local = f"-m trimaran tracker local --nodes 1 --data-dir '{tmp_path}/c' --base-port {port} --json"
    script = f"'{sys.executable}' {local} & wait $!; echo ended $?"
    shell = subprocess.Popen(
        ["sh", "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"TRIMARAN_HOME": str(tmp_path)},
        text=True,
        start_new_session=True,
    )
    assert shell.stdout is not None
    (node,) = orjson.loads(shell.stdout.readline())["nodes"]
    parent = int(Path(f"/proc/{node['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    try:
        os.kill(parent, signal.SIGINT)
        assert select.select([shell.stdout], [], [], 20)[0], "it goes on"
        assert shell.stdout.readline() == "ended 0\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        shell.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.kill(node["pid"], 0)
