"""The menu on a real terminal, used by someone who read nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import CLEAN, COMMAND, PASSWORD, Cluster, Person

_STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07")


class Terminal:
    """`trimaran` in a terminal of 120 columns, and a person at it."""

    def __init__(self, environment: dict[str, str], *argv: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            # Here, not by the parent: who starts first must not decide how wide the terminal is.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
            os.execve(COMMAND, [COMMAND, *argv], CLEAN | {"TERM": "xterm-256color"} | environment)
        self.seen = ""
        self._read_until = 0

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """Read until `text` is on the terminal; answers what came before it."""
        deadline = time.monotonic() + seconds
        while True:
            at = self.seen.find(text, self._read_until)
            if at >= 0:
                before = self.seen[self._read_until : at]
                self._read_until = at + len(text)
                return before
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.seen[self._read_until :]}"
            assert self._read(0.2), f"it ended without {text!r}:\n{self.seen[self._read_until :]}"

    def _read(self, seconds: float) -> bool:
        """False when the other side is gone."""
        readable, _, _ = select.select([self.descriptor], [], [], seconds)
        if not readable:
            return True
        try:
            data = os.read(self.descriptor, 65536)
        except OSError as error:
            if error.errno == errno.EIO:
                return False
            raise
        self.seen += _STYLES.sub("", data.decode(errors="replace"))
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.descriptor, f"{text}\n".encode())

    def press_ctrl_c(self) -> None:
        os.write(self.descriptor, b"\x03")

    def choose(self, title: str) -> None:
        """Type the number that stands before this title in the menu."""
        menu = self.expect("What would you like to do")
        match = re.search(rf"^\s*(\d+)\s+{re.escape(title)}", menu, re.MULTILINE)
        assert match is not None, f"no {title!r} in:\n{menu}"
        self.type(match[1])

    def exit_code(self, seconds: float = 30.0) -> int:
        deadline = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < deadline, f"it goes on:\n{self.seen[-2000:]}"
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)
        os.close(self.descriptor)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(environment: dict[str, str], *argv: str) -> Terminal:
        opened.append(Terminal(environment, *argv))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


def test_from_nothing_to_a_shared_file(
    cluster: Cluster, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    source = tmp_path / "letter to all.txt"
    source.write_text("ahoy\n" * 1000)
    home = tmp_path / "home"
    menu: Terminal = terminal({"TRIMARAN_HOME": str(home)})

    # no cluster is known yet: it asks for one
    menu.expect("Which one shall this peer use?")
    menu.expect("Your choice")
    menu.type("1")
    menu.expect("The trackers' addresses")
    menu.type(cluster.options["TRIMARAN_TRACKERS"])
    menu.expect("CA certificate")
    menu.type(cluster.options["TRIMARAN_CA"])

    menu.choose("Make an account")
    menu.expect("Your user name")
    menu.type("menu-ana")
    menu.expect("Password:")
    menu.type(PASSWORD)
    menu.expect("The same again:")
    menu.type(PASSWORD)
    menu.expect("signed in as menu-ana")

    menu.choose("Make a group")
    menu.expect("The new group's name")
    menu.type("menu-crew")
    menu.expect("$ trimaran group create menu-crew")
    menu.expect("The group menu-crew is yours.")

    # going back from a question, and an answer that is none
    menu.choose("Get files")
    menu.expect("1  menu-crew")
    menu.type("1")
    menu.expect("Nothing is shared in menu-crew yet.")
    menu.expect("What would you like to do")
    menu.type("no number")
    menu.expect("Type a number")
    menu.expect("What would you like to do")
    menu.type("12")  # see all groups
    menu.expect("menu-ana")

    menu.choose("Share a file or a folder")
    menu.expect("Which file or folder")
    menu.type(str(tmp_path / "none"))
    menu.expect("There is no")
    menu.expect("Which file or folder")
    menu.type(f"'{source}'")
    menu.expect("1  menu-crew")
    menu.type("1")
    menu.expect("Its name in the group")
    menu.type("")
    menu.expect("Sharing menu-crew/letter to all.txt")

    menu.choose("See my downloads and shares")
    menu.expect("[C]")
    menu.choose("See what a group shares")
    menu.expect("1  menu-crew")
    menu.type("1")
    menu.expect("letter to all.txt")

    # another person gets it, while the menu is open
    ben = Person(cluster, tmp_path / "ben", "menu-ben")
    ben.ok("register", "menu-ben")
    ben.ok("group", "join", "menu-crew")
    menu.choose("Let someone in")
    menu.expect("1  menu-crew")
    menu.type("1")
    menu.expect("1  menu-ben")
    menu.type("1")
    menu.expect("menu-ben is a member")
    got = ben.ok("get", "menu-crew/letter to all.txt", "-o", str(tmp_path / "out"))
    assert Path(got["path"]).read_text() == source.read_text()

    menu.expect("What would you like to do")
    menu.type("q")
    menu.expect("Sharing ends with the menu")
    assert menu.exit_code() == 0
    assert "Traceback" not in menu.seen
    assert PASSWORD not in menu.seen


def test_ctrl_c_leaves_the_menu(cluster: Cluster, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    menu: Terminal = terminal(cluster.options | {"TRIMARAN_HOME": str(tmp_path / "home")})
    menu.expect("What would you like to do")
    menu.press_ctrl_c()
    assert menu.exit_code() == 0
    assert "Traceback" not in menu.seen


def test_ctrl_c_leaves_the_question_for_a_password(
    cluster: Cluster, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    home = cluster.options | {"TRIMARAN_HOME": str(tmp_path / "home")}
    asked: Terminal = terminal(home, "login", "asked-ana")
    asked.expect("Password:")
    asked.press_ctrl_c()
    assert asked.exit_code() == 130
    told: Terminal = terminal(home, "register", "asked-ana")
    told.expect("Password:")
    told.type("half of")
    told.expect("The same again:")
    assert "half of" not in told.seen
    os.kill(told.pid, signal.SIGTERM)
    assert told.exit_code() == 130
    assert "Traceback" not in asked.seen + told.seen


def test_a_closed_terminal_leaves_nothing_behind(
    cluster: Cluster, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    ana = Person(cluster, tmp_path / "home", "closing-ana")
    ana.ok("register", ana.name)
    menu: Terminal = terminal(ana.environment)
    menu.expect("sharing while this menu is open")
    menu.expect("What would you like to do")
    peer = int((tmp_path / "home" / "lock").read_text())
    os.kill(peer, 0)
    os.kill(menu.pid, signal.SIGHUP)
    assert menu.exit_code() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(peer, 0)


def test_progress_on_a_terminal(cluster: Cluster, terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    ana, ben = (Person(cluster, tmp_path / name, f"progress-{name}") for name in ("ana", "ben"))
    ana.ok("register", ana.name)
    ana.ok("group", "create", "progress")
    ben.ok("register", ben.name)
    ben.ok("group", "join", "progress")
    ana.ok("group", "accept", "progress", ben.name)
    source = tmp_path / "big"
    source.write_bytes(os.urandom(1 << 20) * 12)
    ana.start_peer()
    try:
        ana.ok("share", str(source), "--group", "progress")
        getting: Terminal = terminal(
            ben.environment, "get", "progress/big", "-o", str(tmp_path / "out"), "--down", "3M"
        )
        getting.expect("downloading")
        getting.expect("of 12.0 MiB")
        getting.expect("left")
        getting.expect("pieces")  # 120 columns are wide enough for the map
        getting.expect("from progress-ana")
        getting.press_ctrl_c()
        assert getting.exit_code() == 130
        assert "progress is kept" in getting.seen
        again: Terminal = terminal(ben.environment, "get", "progress/big", "-o", str(tmp_path / "out"))
        again.expect("verified")
        assert again.exit_code() == 0
        assert (tmp_path / "out" / "big").read_bytes() == source.read_bytes()
    finally:
        ana.stop_peer()
