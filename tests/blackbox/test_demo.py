"""The demo, as it is run, and as it is broken off."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from rig import CLEAN, COMMAND, wait_for


def demo(*argv: str, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [COMMAND, "demo", *argv],
        env=CLEAN
        | {"TMPDIR": str(folder), "TRIMARAN_HOME": "/nowhere", "TRIMARAN_TRACKERS": "https://nowhere:1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else True


@pytest.mark.timeout(240)
def test_the_demo_does_what_it_tells(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(24 << 20))
    running = demo("--json", "--file", str(source), folder=tmp_path / "t")
    printed, story = running.communicate(timeout=200)
    assert running.returncode == 0, story
    told = json.loads(printed)
    assert told["equal"] is True
    assert told["sha256_source"] == told["sha256_copy"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert told["leader_killed"] != told["new_leader"]
    assert told["seeder_killed"] == "ben"
    assert {each["user"] for each in told["sources"]} == {"ana", "ben"}
    assert told["refused_after_kick_seconds"] < 3.0
    pids = [int(pid) for pid in re.findall(r"process (\d+)", story)]
    assert len(pids) == 6
    assert all(gone(pid) for pid in pids)
    assert list((tmp_path / "t").iterdir()) == []
    assert source.exists()


@pytest.mark.timeout(240)
def test_ctrl_c_stops_everything_it_started(tmp_path: Path) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    (source / "file.bin").write_bytes(os.urandom(16 << 20))
    running = demo("--file", str(source), folder=tmp_path / "t")
    story = ""
    assert running.stdout is not None
    while "cho downloads it" not in story:
        line = running.stdout.readline()
        assert line, (story, running.communicate())
        story += line
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=60)
    assert running.returncode == 130, (story + rest, errors)
    pids = [int(pid) for pid in re.findall(r"process (\d+)", story)]
    assert len(pids) == 6
    wait_for(lambda: all(gone(pid) for pid in pids), "all processes to end", seconds=10)
    assert list((tmp_path / "t").iterdir()) == []


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    running = demo("--json", "--file", str(tmp_path / "none"), folder=tmp_path / "t")
    printed, errors = running.communicate(timeout=60)
    assert (running.returncode, printed) == (3, "")
    assert json.loads(errors.splitlines()[-1])["error"]["code"] == "no-such-path"
