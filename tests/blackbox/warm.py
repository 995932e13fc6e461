"""Runs a command line in a process of its own that did not have to load the modules first.

A test run makes hundreds of short commands, and three quarters of each is loading Python modules. A fork server
loads them once; each command is then a fresh process with its own arguments, environment and standard streams, that
enters where the installed command enters. `TRIMARAN_INSTALLED=1` (or TRIMARAN_FULL) starts the installed command instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_LOADED = [
    *(
        "trimaran.cli.main",
        "trimaran.cli.app",
        "trimaran.cli.people",
        "trimaran.cli.groups",
        "trimaran.cli.files",
    ),
    *(
        "trimaran.cli.transfers",
        "trimaran.cli.cluster",
        "trimaran.cli.peer",
        "peer.session",
        "cluster.api.client",
    ),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_LOADED)


def run_warm(
    argv: list[str], environment: Mapping[str, str], stdin: str, timeout_seconds: float
) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. Raises `TimeoutError`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").write_text(stdin)
        process = _context.Process(
            target=_enter, args=(argv, dict(environment), str(folder), str(Path.cwd()))
        )
        process.start()
        process.join(timeout_seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{argv} took longer than {timeout_seconds} s")
        return process.exitcode, (folder / "out").read_text(), (folder / "err").read_text()


def _enter(argv: list[str], environment: dict[str, str], folder: str, working_folder: str) -> None:
    for number, (name, flags) in enumerate(
        [("in", os.O_RDONLY), ("out", os.O_WRONLY | os.O_CREAT), ("err", os.O_WRONLY | os.O_CREAT)]
    ):
        descriptor = os.open(f"{folder}/{name}", flags, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0, "r"), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working_folder)
    sys.argv = ["trimaran", *argv]
    from trimaran.cli.main import main

    main()
