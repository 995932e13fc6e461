"""The main job on real input, sized for every day; `TRIMARAN_FULL=1` takes the full sizes (minutes, gigabytes).

Folder and file from two seeders at once; `kill -9` in the middle and only the rest again; three downloaders who help each
other behind one slow seeder. Bytes are counted where they are sent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rig import CLEAN, COMMAND, Person, wait_for

MakePerson = Callable[[str], Person]
FULL = bool(os.environ.get("TRIMARAN_FULL"))
MIB = 1 << 20
FILE_BYTES = 1024 * MIB if FULL else 96 * MIB
RESUMED_BYTES = 512 * MIB if FULL else 32 * MIB
RESUMED_RATE = "20M" if FULL else "3M"
EACH_SEEDERS_RATE = (
    "0" if FULL else "20M"
)  # small files are over before the scheduler of a busy machine is fair
SWARM_BYTES = 256 * MIB if FULL else 64 * MIB

pytestmark = pytest.mark.timeout(900 if FULL else 240)


def random_file(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(os.urandom(MIB))
    return path


def sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path) -> dict[str, str]:
    """Every file's sum, every folder, every executable bit."""
    return {
        each.relative_to(folder).as_posix(): (
            "folder" if each.is_dir() else f"{sum_of(each)} {each.stat().st_mode & 0o100}"
        )
        for each in folder.rglob("*")
        if not each.is_symlink()
    }


def library(folder: Path) -> Path:
    """Python's own library: as it is installed, or its sources alone."""
    real = Path(sysconfig.get_path("stdlib"))
    copy = folder / "library"
    left_out = (
        ("site-packages", "dist-packages")
        if FULL
        else ("site-packages", "dist-packages", "__pycache__", "test*")
    )
    # Links out of the folder, which some installations have, are refused at share.
    shutil.copytree(real, copy, symlinks=False, ignore=shutil.ignore_patterns(*left_out))
    return copy


def group_of(owner: Person, group: str, *others: Person) -> None:
    owner.ok("group", "create", group)
    for each in others:
        each.ok("group", "join", group)
        owner.ok("group", "accept", group, each.name)


def uploaded(person: Person) -> int:
    return sum(row["uploaded_bytes"] for row in person.ok("ps"))


def test_a_folder_and_a_large_file_from_two_seeders(person: MakePerson, tmp_path: Path) -> None:
    ana, ben, cho = person("two-ana"), person("two-ben"), person("two-cho")
    group_of(ana, "two", ben, cho)
    folder = library(tmp_path)
    file = random_file(tmp_path / "large.bin", FILE_BYTES)
    for seeder in (ana, ben):
        seeder.start_peer("--up", EACH_SEEDERS_RATE)
        seeder.ok("share", str(folder), "--group", "two", timeout_seconds=600)
        seeder.ok("share", str(file), "--group", "two", timeout_seconds=600)
    assert {each["name"]: each["seeders"] for each in cho.ok("files", "two")} == {
        "library": 2,
        "large.bin": 2,
    }
    for name in ("library", "large.bin"):
        got = cho.ok("get", f"two/{name}", "-o", str(tmp_path / "out"), timeout_seconds=600)
        assert got["received_bytes"] + got["reused_bytes"] >= got["size_bytes"]
        shares = sorted(each["bytes"] / got["received_bytes"] for each in got["sources"])
        assert len(shares) == 2, got["sources"]
        assert shares[0] >= 0.30, (name, got["sources"])
    assert sum_of(tmp_path / "out" / "large.bin") == sum_of(file)
    assert sums_of(tmp_path / "out" / "library") == sums_of(folder)


def test_killed_at_half_only_the_rest_is_sent_again(person: MakePerson, tmp_path: Path) -> None:
    ana, ben, cho = person("kill-ana"), person("kill-ben"), person("kill-cho")
    group_of(ana, "kill", ben, cho)
    file = random_file(tmp_path / "file.bin", RESUMED_BYTES)
    for seeder in (ana, ben):
        seeder.start_peer()
        seeder.ok("share", str(file), "--group", "kill", timeout_seconds=600)
    argv = ("get", "kill/file.bin", "-o", str(tmp_path / "out"))
    first = subprocess.Popen(
        [COMMAND, *argv, "--down", RESUMED_RATE, "--json"],
        env=CLEAN | cho.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(
            lambda: uploaded(ana) + uploaded(ben) >= RESUMED_BYTES * 0.5, "half of the file", seconds=120
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (tmp_path / "out" / "file.bin").exists(), "it was too quick to be killed in the middle"
    before = uploaded(ana) + uploaded(ben)
    assert before < RESUMED_BYTES * 0.85
    got = cho.ok(*argv, timeout_seconds=600)
    sent_again = uploaded(ana) + uploaded(ben) - before
    assert sum_of(Path(got["path"])) == sum_of(file)
    assert sent_again < RESUMED_BYTES * 0.55, f"{sent_again / RESUMED_BYTES:.0%} were sent in the second run"
    assert got["received_bytes"] < RESUMED_BYTES * 0.55
    assert got["reused_bytes"] > RESUMED_BYTES * 0.45


def test_downloaders_help_each_other_behind_a_slow_seeder(person: MakePerson, tmp_path: Path) -> None:
    ana = person("swarm-ana")
    downloaders = [person(f"swarm-{name}") for name in ("ben", "cho", "dan")]
    group_of(ana, "swarm", *downloaders)
    file = random_file(tmp_path / "file.bin", SWARM_BYTES)
    seeder = ana.start_peer("--up", "20M")["peer_id"]
    ana.ok("share", str(file), "--group", "swarm", timeout_seconds=600)
    reports: list[dict[str, object]] = []

    def get(someone: Person) -> None:
        done = someone.run("get", "swarm/file.bin", "-o", str(tmp_path / someone.name), timeout_seconds=600)
        reports.append(json.loads(done.out) if done.code == 0 else {"failed": done})

    threads = [threading.Thread(target=get, args=(each,)) for each in downloaders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("path" in report for report in reports), reports
    sources = [each for report in reports for each in report["sources"]]  # type: ignore[attr-defined]
    whole = sum(each["bytes"] for each in sources)
    helped = sum(each["bytes"] for each in sources if each["peer_id"] != seeder)
    assert whole >= 3 * SWARM_BYTES
    assert helped >= 0.40 * whole, f"only {helped / whole:.0%} came from other downloaders"
    for someone in downloaders:
        assert sum_of(tmp_path / someone.name / "file.bin") == sum_of(file)
