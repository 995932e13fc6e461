"""Questions: numbers, names, paths, and picking from what there is.

Owned here: how a person is asked, and the lists that answers are picked from. An empty answer without a default,
or `b`, goes back. Left to others: what is done with the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from rich.console import Console
from rich.prompt import Confirm, Prompt
from rich.text import Text, TextType

from cluster.api.errors import TrackerError
from peer.reports import TrimaranError
from peer.trouble import of_tracker
from trimaran.output import Output, counted, harmless, sized
from trimaran.settings import common_of_environment
from trimaran.terminal import line
from trimaran.wiring import SignedIn, peer_session, signed_in

T = TypeVar("T")


class BackError(Exception):
    """The person changed their mind."""


class _Typed:
    """What is typed comes by `line`, where no Ctrl-C is lost."""

    @classmethod
    def get_input(
        cls, console: Console, prompt: TextType, password: bool, stream: TextIO | None = None
    ) -> str:
        console.print(prompt, end="")
        return line()


class _Prompt(_Typed, Prompt):
    pass


class _Confirm(_Typed, Confirm):
    pass


def base_name(path: str) -> str:
    return Path(path).expanduser().absolute().name


def choice(console: Console, question: str, count: int) -> int | None:
    """A number from 1 to `count`, or None to leave."""
    while True:
        answer = _Prompt.ask(question, console=console, default="", show_default=False).strip().lower()
        if answer in ("q", "quit", "exit"):
            return None
        if answer.isdecimal() and 1 <= int(answer) <= count:
            return int(answer)
        console.print(Text(f"Type a number from 1 to {count}, or q.", "yellow"))


class Asker:
    """Asks for one command's arguments."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def text(self, question: str, default: str | None = None) -> str:
        answer = _Prompt.ask(
            Text(question),
            console=self._console,
            default=default if default is not None else "",
            show_default=bool(default),
        ).strip()
        if not answer and default is None:
            raise BackError
        return answer

    def yes(self, question: str) -> bool:
        return _Confirm.ask(Text(harmless(question)), console=self._console, default=False)

    def path(self, question: str) -> str:
        while True:
            answer = self.text(question)
            # Terminals put quotes around what is dropped on them.
            if len(answer) > 1 and answer[0] == answer[-1] and answer[0] in "'\"":
                answer = answer[1:-1]
            path = Path(answer).expanduser()
            if path.exists():
                return str(path)
            self._console.print(Text(f"There is no {path}. (Empty goes back.)", "yellow"))

    def folder(self, question: str, default: str) -> str:
        return str(Path(self.text(question, default)).expanduser())

    # --- picking from what there is ---------------------------------------------------------------

    def my_group(self) -> str:
        groups = self._asked(lambda here: here.trackers.list_groups()).groups
        mine = [each.name for each in groups if each.role]
        return self._pick(
            "Which group", mine, "You are in no group yet. Make one, or ask to join one, first."
        )

    def any_group(self) -> str:
        groups = self._asked(lambda here: here.trackers.list_groups()).groups
        others = [each.name for each in groups if not each.role]
        return self._pick("Which group", others, "There is no other group.")

    def file_of(self, group: str) -> str:
        return self.files_of(group, several=False)[0]

    def files_of(self, group: str, *, several: bool = True) -> list[str]:
        files = self._asked(lambda here: here.trackers.list_files(group)).files
        titles = [
            f"{each.name}  ({sized(each.size_bytes)}, {counted(each.seeders, 'seeder')})" for each in files
        ]
        question = "Which files (several with commas)" if several else "Which file"
        picked = self._pick_numbers(question, titles, f"Nothing is shared in {group} yet.", several=several)
        return [files[index].name for index in picked]

    def member_of(self, group: str, question: str) -> str:
        members = self._asked(lambda here: here.trackers.show_group(group)).members
        titles = [f"{each.user}  ({each.role})" for each in members]
        return members[self._pick_numbers(question, titles, "There is nobody.", several=False)[0]].user

    def request_of(self, group: str) -> str:
        asking = self._asked(lambda here: here.trackers.list_join_requests(group)).requests
        return self._pick("Whose request", [each.user for each in asking], f"Nobody asks to join {group}.")

    def transfer(self) -> str:
        async def listed() -> list[str]:
            async with peer_session(common_of_environment()) as session:
                return [f"{row.group}/{row.name}" for row in await session.ps()]

        return self._pick("Which one", self._run(listed()), "Nothing is downloaded or shared here.")

    def _asked(self, ask: Callable[[SignedIn], Awaitable[T]]) -> T:
        async def asked() -> T:
            async with signed_in(common_of_environment()) as here:
                return await ask(here)

        return self._run(asked())

    def _run(self, work: Awaitable[T]) -> T:
        async def done() -> T:
            return await work

        try:
            return asyncio.run(done())
        except TrackerError as error:
            Output().error(of_tracker(error))
        except TrimaranError as error:
            Output().error(error)
        raise BackError

    def _pick(self, question: str, names: Sequence[str], empty: str) -> str:
        return names[self._pick_numbers(question, names, empty, several=False)[0]]

    def _pick_numbers(self, question: str, titles: Sequence[str], empty: str, *, several: bool) -> list[int]:
        if not titles:
            self._console.print(Text(harmless(empty), "yellow"))
            raise BackError
        for number, title in enumerate(titles, 1):
            self._console.print(Text(f" {number:>3}  {harmless(title)}"))
        while True:
            answer = self.text(question, "1" if len(titles) == 1 else None)
            parts = [each.strip() for each in answer.split(",") if each.strip()]
            if answer.lower() in ("b", "back", "q"):
                raise BackError
            if all(each.isdecimal() and 1 <= int(each) <= len(titles) for each in parts) and (
                several or len(parts) == 1
            ):
                return [int(each) - 1 for each in dict.fromkeys(parts)]
            self._console.print(Text(f"Type a number from 1 to {len(titles)}, or b to go back.", "yellow"))
