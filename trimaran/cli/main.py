"""The command's first and last steps: which verb is meant, running it, and how it ends.

Owned here: parsing, common options in front of the verb, signals, exit codes, the last resort for errors
that nobody expected. Left to others: what the verbs do (one module per noun).
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from cyclopts import CycloptsError

    from peer.reports import TrimaranError
    from trimaran.output import Output

Dispatch = Callable[[Sequence[str]], int]

NOUNS = frozenset({"group", "peer", "tracker", "cluster"})
_WITH_VALUE = frozenset({"--home", "--trackers", "--ca", "--config"})
_ALONE = frozenset({"--insecure", "--json", "--quiet", "-q"})


def main() -> NoReturn:
    sys.exit(dispatch(sys.argv[1:]))


def dispatch(argv: Sequence[str]) -> int:
    """Run one command line. Answers its exit code; never raises, never prints a traceback."""
    from trimaran.output import Output
    from trimaran.settings import TRUE

    spoken = Output(
        json="--json" in argv or os.environ.get("TRIMARAN_JSON", "").lower() in TRUE,
        quiet="--quiet" in argv or "-q" in argv,
    )
    try:
        return _run(list(argv))
    except BaseException as error:
        return _ended_by(error, argv, spoken)


def _run(argv: list[str]) -> int:
    from trimaran.cli.app import build

    ordered = hoisted(argv)
    app = build(ordered[0] if ordered else "")
    if not argv:
        if sys.stdin.isatty() and sys.stdout.isatty():
            from trimaran.menu.main import run

            return run(dispatch)
        app.help_print([])
        return 2  # as uv: no verb is a usage error, and the help is the message
    function, bound, *_ = app.parse_args(ordered, exit_on_error=False, print_error=False)
    result = function(*bound.args, **bound.kwargs)
    if inspect.isawaitable(result):
        from trimaran import log

        common = bound.arguments.get("common")
        log.to_home(common.home_folder if common is not None else _home_of(argv))
        result = run_async(result)
    return int(result) if isinstance(result, int) else 0


def hoisted(argv: Sequence[str]) -> list[str]:
    """Common options may stand in front of the verb: move them behind it, where the parser wants them."""
    moved: list[str] = []
    path: list[str] = []
    index = 0
    while index < len(argv):
        token = argv[index]
        if token in _ALONE or (token.partition("=")[0] in _WITH_VALUE and "=" in token):
            moved.append(token)
        elif token in _WITH_VALUE and index + 1 < len(argv):
            moved += argv[index : index + 2]
            index += 1
        elif token.startswith("-"):
            break
        else:
            path.append(token)
            if len(path) == (2 if path[0] in NOUNS else 1):
                index += 1
                break
        index += 1
    return [*path, *moved, *argv[index:]]


def run_async(work: Awaitable[Any]) -> Any:
    """Run to the end. Ctrl-C, SIGTERM and a closed terminal cancel the work, which ends itself tidily."""
    import asyncio

    from peer.holding import HoldingLoop

    async def until_done() -> Any:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def end() -> None:
            # Once: supervisors repeat SIGTERM, and the tidying up must not be cancelled as well.
            # Ignored by the process itself, not by the loop: it must hold until the process is gone.
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            task.cancel()

        loop.add_signal_handler(signal.SIGTERM, end)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal, without nohup
            loop.add_signal_handler(signal.SIGHUP, end)
        return await work

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script's `trimaran ... &`: its shell turned SIGINT off, so that a Ctrl-C is not for all. Who says `kill -INT`
        # means us.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    coroutine: Coroutine[Any, Any, Any] = until_done()
    with asyncio.Runner(loop_factory=HoldingLoop) as runner:
        return runner.run(coroutine)


def _ended_by(error: BaseException, argv: Sequence[str], spoken: Output) -> int:
    from peer.reports import Exit, TrimaranError

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, BrokenPipeError):
        # Who read our answer has gone: say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return Exit.UNEXPECTED
    told = error if isinstance(error, TrimaranError) else _told(error, argv)
    try:
        spoken.error(told)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return int(told.exit_code)


def _told(error: BaseException, argv: Sequence[str]) -> TrimaranError:
    """The error as a person should hear of it."""
    import asyncio

    from cyclopts import CycloptsError

    from cluster.api.errors import TrackerError
    from peer.reports import Exit, TrimaranError
    from peer.trouble import of_system, of_tracker
    from trimaran import failures

    if isinstance(error, BaseExceptionGroup):
        return _told(_most_telling(error), argv)
    if isinstance(error, TrimaranError):
        return error
    if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
        return TrimaranError(
            "Interrupted; progress is kept.",
            exit_code=Exit.INTERRUPTED,
            code="interrupted",
            outcome="indefinite",
            hint="The same command again goes on from there.",
        )
    if isinstance(error, CycloptsError):
        words = [each for each in hoisted(argv)[:2] if not each.startswith("-")]
        verbs = [" ".join(words), *words[:1]] if words[:1] and words[0] in NOUNS else words[:1]
        verb = next((each for each in verbs if _known_verb(each)), "")
        return TrimaranError(
            _sentence(error),
            exit_code=Exit.USAGE,
            code="usage",
            hint=f"See: trimaran {verb} --help" if verb else "See: trimaran --help",
        )
    if isinstance(error, TrackerError):
        return of_tracker(error)
    if isinstance(error, Exception) and (node := failures.of_node(error)) is not None:
        return node
    if isinstance(error, OSError) and (known := of_system(error)) is not None:
        return known
    return failures.crashed(_home_of(argv), error)


def _most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Of several errors at once: one that a person can act on, else the first."""
    from peer.reports import TrimaranError

    leaves: list[BaseException] = []
    waiting: list[BaseException] = [group]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, BaseExceptionGroup):
            waiting.extend(each.exceptions)
        else:
            leaves.append(each)
    return next((each for each in leaves if isinstance(each, TrimaranError)), leaves[0])


def _sentence(error: CycloptsError) -> str:
    from cyclopts import MissingArgumentError, UnknownCommandError

    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and error.argument is not None and error.keyword is None:
        return f"`trimaran {' '.join(error.command_chain or ())}` needs {error.argument.name}."
    if isinstance(error, MissingArgumentError) and error.keyword is not None:
        return f"{error.keyword} needs a value."
    if isinstance(error, UnknownCommandError):
        said, _, known = text.partition(" Available commands: ")
        noun = f"trimaran {' '.join(error.command_chain)}" if error.command_chain else ""
        if noun and error.unused_tokens and error.unused_tokens[0].startswith("-"):
            return f"`{noun}` needs a verb: {known}"
        if not noun and error.unused_tokens and error.unused_tokens[0].startswith("-"):
            return "There is no verb among these words."
        return said if "Did you mean" in said or not noun else f"{said} `{noun}` knows: {known}"
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _known_verb(verb: str) -> bool:
    from trimaran.cli.app import build

    app = build()
    try:
        for word in verb.split()[: 2 if verb.split()[:1] and verb.split()[0] in NOUNS else 1]:
            app = app[word]
    except KeyError:
        return False
    return bool(verb)


def _home_of(argv: Sequence[str]) -> Path:
    from trimaran.settings import home_folder

    home = os.environ.get("TRIMARAN_HOME", "")
    for index, token in enumerate(argv):
        if token == "--home" and index + 1 < len(argv):  # noqa: S105 - an option, no secret
            home = argv[index + 1]
        elif token.startswith("--home="):
            home = token.partition("=")[2]
    return home_folder(home)
