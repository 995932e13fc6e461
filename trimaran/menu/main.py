"""`trimaran` alone on a terminal: what can be done, numbered; what is needed, asked for.

Owned here: the loop, and what is offered when. Every choice ends in a command line that is shown and run, so
the menu can do nothing that the commands cannot, and teaches them. Left to others: asking (`asking.py`), the
processes that run while the menu is open (`backstage.py`).
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from trimaran.output import harmless

from . import asking
from .asking import BackError
from .backstage import Backstage

Dispatch = Callable[[Sequence[str]], int]


@dataclass(frozen=True, slots=True)
class Choice:
    title: str
    compose: Callable[[asking.Asker], list[str]]  # asks for what is missing, answers the command line


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    choices: tuple[Choice, ...]


def _file_of_group(asker: asking.Asker) -> str:
    group = asker.my_group()
    return f"{group}/{asker.file_of(group)}"


def _get(asker: asking.Asker) -> list[str]:
    group = asker.my_group()
    names = [f"{group}/{name}" for name in asker.files_of(group)]
    return ["get", *names, "-o", asker.folder("Into which folder", ".")]


def _share(asker: asking.Asker) -> list[str]:
    path = asker.path("Which file or folder")
    group = asker.my_group()
    name = asker.text("Its name in the group", asking.base_name(path))
    return ["share", path, "--group", group, *(["--name", name] if name != asking.base_name(path) else [])]


def _member(verb: str, question: str) -> Callable[[asking.Asker], list[str]]:
    def compose(asker: asking.Asker) -> list[str]:
        group = asker.my_group()
        return ["group", verb, group, asker.member_of(group, question)]

    return compose


def _request(verb: str) -> Callable[[asking.Asker], list[str]]:
    def compose(asker: asking.Asker) -> list[str]:
        group = asker.my_group()
        return ["group", verb, group, asker.request_of(group)]

    return compose


def _sure(asker: asking.Asker, question: str, argv: list[str]) -> list[str]:
    if not asker.yes(question):
        raise BackError
    return argv


def _remove(asker: asking.Asker) -> list[str]:
    shared = _file_of_group(asker)
    return _sure(asker, f"Take {shared} off the group for everyone", ["remove", shared])


def _delete(asker: asking.Asker) -> list[str]:
    group = asker.my_group()
    return _sure(asker, f"Delete {group} with everything it shares", ["group", "delete", group])


def _cancel(asker: asking.Asker) -> list[str]:
    shared = asker.transfer()
    return _sure(asker, f"Give {shared} up and delete its unfinished part", ["cancel", shared])


def _limits(asker: asking.Asker) -> list[str]:
    up = asker.text("Send at most, per second (like 2M; 0 is unlimited; empty leaves it as it is)", "")
    each = asker.text("Send to each downloader at most, per second", "")
    down = asker.text("Receive at most, per second", "")
    said = {"--up": up, "--up-each": each, "--down": down}
    return ["peer", "limits", *(word for option, rate in said.items() if rate for word in (option, rate))]


def _leave(asker: asking.Asker) -> list[str]:
    group = asker.my_group()
    question = f"Leave {group} (the last one out removes it with all it shares)"
    return _sure(asker, question, ["group", "leave", group])


def _hand_over(asker: asking.Asker) -> list[str]:
    argv = _member("transfer", "To whom")(asker)
    return _sure(asker, f"Make {argv[-1]} the owner of {argv[-2]}", argv)


SIGNED_IN: tuple[Section, ...] = (
    Section(
        "Files",
        (
            Choice("See what a group shares", lambda asker: ["files", asker.my_group()]),
            Choice("Get files", _get),
            Choice("Share a file or a folder", _share),
            Choice("See my downloads and shares", lambda _: ["ps"]),
            Choice("See who has a file", lambda asker: ["info", _file_of_group(asker)]),
            Choice("Pause a download", lambda asker: ["pause", asker.transfer()]),
            Choice("Resume a download", lambda asker: ["resume", asker.transfer()]),
            Choice("Cancel a download", _cancel),
            Choice("Check a file's pieces", lambda asker: ["verify", asker.transfer()]),
            Choice("Stop sharing a file", lambda asker: ["unshare", asker.transfer()]),
            Choice("Take a file off its group", _remove),
        ),
    ),
    Section(
        "Groups",
        (
            Choice("See all groups", lambda _: ["group", "list"]),
            Choice("Make a group", lambda asker: ["group", "create", asker.text("The new group's name")]),
            Choice("Ask to join a group", lambda asker: ["group", "join", asker.any_group()]),
            Choice("Withdraw my request", lambda asker: ["group", "withdraw", asker.any_group()]),
            Choice("See a group's members", lambda asker: ["group", "members", asker.my_group()]),
            Choice("Leave a group", _leave),
        ),
    ),
    Section(
        "Running a group",
        (
            Choice("See who asks to join", lambda asker: ["group", "requests", asker.my_group()]),
            Choice("Let someone in", _request("accept")),
            Choice("Turn a request down", _request("reject")),
            Choice("Put a member out", _member("kick", "Whom")),
            Choice("Make a member an admin", _member("promote", "Whom")),
            Choice("Make an admin a plain member", _member("demote", "Whom")),
            Choice("Hand the group over", _hand_over),
            Choice("Read the log of rights", lambda asker: ["group", "log", asker.my_group()]),
            Choice("Delete a group", _delete),
        ),
    ),
    Section(
        "This peer and the cluster",
        (
            Choice("Limit sending and receiving", _limits),
            Choice("See the cluster", lambda _: ["cluster", "status"]),
            Choice("Who am I", lambda _: ["whoami"]),
            Choice("Change my password", lambda _: ["passwd"]),
            Choice("Sign out", lambda _: ["logout"]),
        ),
    ),
)

SIGNED_OUT: tuple[Section, ...] = (
    Section(
        "Begin",
        (
            Choice("Make an account", lambda asker: ["register", asker.text("Your user name")]),
            Choice("Sign in", lambda asker: ["login", asker.text("Your user name")]),
            Choice("See the cluster", lambda _: ["cluster", "status"]),
            Choice("Watch a demonstration (half a minute, on this machine alone)", lambda _: ["demo"]),
        ),
    ),
)


def run(dispatch: Dispatch) -> int:
    """Until the person leaves. Answers the exit code."""
    console = Console(highlight=False)
    console.print(
        Panel.fit("[bold]Trimaran[/bold]\nfiles for groups of people, from each other", border_style="cyan")
    )
    with Backstage(console) as backstage, _ended_tidily():
        while True:
            try:
                if not backstage.knows_trackers():
                    if not _first_steps(console, backstage, dispatch):
                        return 0
                    continue
                user = backstage.user()
                if user:
                    backstage.peer_up()
                choice = _choose(console, backstage, SIGNED_IN if user else SIGNED_OUT, user)
                if choice is None:
                    return 0
                _do(console, choice.compose(asking.Asker(console)), dispatch)
            except BackError:
                continue
            except (KeyboardInterrupt, EOFError):
                console.print()
                return 0


@contextmanager
def _ended_tidily() -> Iterator[None]:
    """A closed terminal or SIGTERM leaves the menu as `q` does, so that nothing stays behind; a Ctrl-C is heard even
    if who started us ignores it."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    ways = {signal.SIGTERM: leave, signal.SIGHUP: leave, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in ways.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _do(console: Console, argv: list[str], dispatch: Dispatch) -> None:
    line = shlex.join(["trimaran", *argv])
    console.print(Text(f"$ {harmless(line)}", "bright_black"), soft_wrap=True)
    code = dispatch(argv)
    console.print(Text("" if code == 0 else f"(exit code {code})", "bright_black"))


def _choose(
    console: Console, backstage: Backstage, sections: tuple[Section, ...], user: str
) -> Choice | None:
    console.rule(style="bright_black")
    console.print(Text.assemble((harmless(user) or "Nobody signed in", "bold"), f"   {backstage.summary()}"))
    flat: list[Choice] = []
    for section in sections:
        console.print(f"\n[bold cyan]{section.title}[/]")
        for choice in section.choices:
            flat.append(choice)
            console.print(f" {len(flat):>3}  {choice.title}")
    console.print("\n   q  Leave")
    answer = asking.choice(console, "\nWhat would you like to do", len(flat))
    return None if answer is None else flat[answer - 1]


def _first_steps(console: Console, backstage: Backstage, dispatch: Dispatch) -> bool:
    """Which cluster? Answers False to leave."""
    console.print(
        "\nFiles are found through a small cluster of trackers. Which one shall this peer use?\n\n"
        "   1  One that exists: I have its addresses\n"
        "   2  Start one on this machine, to try things out\n"
        "   3  None yet: watch a demonstration first (half a minute)\n"
        "   q  Leave"
    )
    answer = asking.choice(console, "\nYour choice", 3)
    asker = asking.Asker(console)
    if answer is None:
        return False
    if answer == 1:
        addresses = asker.text("The trackers' addresses, with commas (like https://host:7000)")
        ca = asker.text("The file with the cluster's CA certificate (empty for plain http)", "")
        backstage.use_trackers(addresses, ca)
    elif answer == 2:
        backstage.start_cluster()
    else:
        _do(console, ["demo"], dispatch)
    return True
