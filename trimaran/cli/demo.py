"""`trimaran demo`: the main job on a real file, with a tracker and a seeder lost on the way."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from trimaran.settings import DEFAULTS, Common


async def demo(
    *,
    file: Annotated[
        str, Parameter(name=["--file", "-f"], metavar="PATH", help="Share this file or folder.")
    ] = "",
    keep: Annotated[bool, Parameter(help="Keep the demo's folder with all logs and files.")] = False,
    kill: Annotated[
        bool,
        Parameter(
            name="--kill", negative="--no-kill", help="Kill the leader and a seeder in the middle (default)."
        ),
    ] = True,
    picture: Annotated[str, Parameter(metavar="SVG", help="Also write what was printed as a picture.")] = "",
    common: Common = DEFAULTS,
) -> int:
    """See it work on this machine: three trackers, three peers, a real file, and nodes lost on the way.

    Everything runs on loopback in a temporary folder, and is stopped and removed at the end.
    """
    from trimaran.demo import run

    return await run(file=file, keep=keep, kill=kill, picture=picture, common=common)
