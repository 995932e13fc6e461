"""The systemd units: what systemd says about them where it is installed, and what can be read anywhere."""

from __future__ import annotations

import configparser
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",)
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return parser


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed here")
    # The program lies elsewhere on this machine: everything but its path is checked as it is.
    program = tmp_path / "trimaran"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/trimaran/bin/trimaran", str(program)))
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaints = [line for line in run.stderr.splitlines() if unit.name in line]
    assert run.returncode == 0, run.stderr
    assert complaints == []


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_unit_runs_what_exists_as_a_user_of_its_own(unit: Path) -> None:
    service = read(unit)["Service"]
    users = (UNITS / "trimaran.sysusers.conf").read_text()
    assert f"u {service['User']} " in users
    assert service["User"] != "root"
    assert service["ExecStart"].split()[1:3] in (["tracker", "run"], ["peer", "run"])
    assert service["NoNewPrivileges"] == "yes"


def test_the_tracker_is_given_time_to_hand_over() -> None:
    service = read(UNITS / "trimaran-tracker.service")["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"].removesuffix("s")) > 10


def test_the_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.app import tell_manager

    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        tell_manager("READY=1")
        assert manager.recv(64) == b"READY=1"
    tell_manager("STOPPING=1")  # nobody listens any more: no harm
    monkeypatch.delenv("NOTIFY_SOCKET")
    tell_manager("READY=1")
