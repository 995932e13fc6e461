"""Sharing files, listing them, getting them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from peer.reports import Exit, GetReport, TrimaranError
from trimaran.output import Output, counted, harmless, lasting, rated, sized
from trimaran.progress import Display
from trimaran.settings import DEFAULTS, Common, a_name, group_and_name, peer_settings, rate
from trimaran.wiring import peer_session, signed_in, until_cancelled

SharedName = Annotated[str, Parameter(name="GROUP/NAME", help="A shared file.")]
Group = Annotated[str, Parameter(help="The group's name.", validator=a_name)]


async def share(
    path: Annotated[str, Parameter(help="A file or a folder.")],
    /,
    *,
    group: Annotated[
        str, Parameter(name=["--group", "-g"], help="The group that may have it.", validator=a_name)
    ],
    name: Annotated[str, Parameter(help="Its name in the group; else the file's own.")] = "",
    replace: Annotated[bool, Parameter(help="Replace other content shared under this name.")] = False,
    algorithm: Annotated[str, Parameter(help="sha256 (default) or blake3, for the pieces.")] = "",
    listen: Annotated[str, Parameter(metavar="HOST:PORT", help="Where other peers reach this one.")] = "",
    advertise: Annotated[
        str, Parameter(metavar="URL,URL", help="As which addresses it is told to others.")
    ] = "",
    up: Annotated[str, Parameter(metavar="RATE", help="Send at most this much per second (20M).")] = "",
    common: Common = DEFAULTS,
) -> None:
    """Share a file or a folder with a group.

    While `trimaran peer run` runs in this home it serves the file and the command returns at once. Without it the
    command itself serves, until Ctrl-C. The same content shared again under its name adds a seeder.
    """
    out = Output.of(common)
    settings = peer_settings(common, listen=listen, advertise=advertise, up=up, algorithm=algorithm)
    async with peer_session(common, settings) as session:
        with Display(quiet=common.quiet) as display:
            report = await session.share(
                Path(path).expanduser(),
                group,
                name or None,
                replace=replace,
                algorithm=algorithm or None,
                on_progress=display.update,
            )
        told = (
            f"{report.group}/{report.name}: {sized(report.size_bytes)} in {counted(report.pieces, 'piece')}"
        )
        out.answer(report, f"Sharing {harmless(told)}.")
        if session.remote:
            out.note("The running peer serves it.")
            return
        out.note("Serving; Ctrl-C ends it. (`trimaran peer run` serves in the background of your commands.)")
        await until_cancelled(session.serve_forever())


async def unshare(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Stop sharing a file from this peer. Nothing is deleted; others keep what they have."""
    group, name = group_and_name(shared)
    async with peer_session(common) as session:
        revision = await session.unshare(group, name)
    Output.of(common).answer(
        {"revision": revision}, f"{harmless(shared)} is no longer shared from this peer."
    )


async def remove(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Take a file off its group: who shared it may, and the group's admins."""
    group, name = group_and_name(shared)
    async with signed_in(common) as here:
        done = await here.once(
            ("remove", group, name), lambda key: here.trackers.remove_file(group, name, key=key)
        )
    Output.of(common).answer({"revision": done.revision}, f"{harmless(shared)} is taken off the group.")


async def files(group: Group, /, *, common: Common = DEFAULTS) -> None:
    """List a group's files with their seeders and leechers as they are now."""
    async with signed_in(common) as here:
        listed = (await here.trackers.list_files(group)).files
    out = Output.of(common)
    out.answer(
        listed,
        lambda: out.table(
            ("NAME", "KIND", "SIZE", "PIECES", "SEEDERS", "LEECHERS", "SHARED BY"),
            [
                (
                    each.name,
                    each.kind,
                    sized(each.size_bytes),
                    each.pieces,
                    each.seeders,
                    each.leechers,
                    each.shared_by,
                )
                for each in listed
            ],
            empty=f"Nothing is shared in {group} yet. Share something: trimaran share PATH --group {group}",
        ),
    )


async def info(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Show one shared file and the peers that have it."""
    import msgspec

    group, name = group_and_name(shared)
    async with signed_in(common) as here:
        shown = (await here.trackers.show_file(group, name)).file
        swarm = await here.trackers.show_swarm(group, name)
    document = msgspec.to_builtins(shown) | {"peers": msgspec.to_builtins(swarm.peers)}
    out = Output.of(common)

    def for_people() -> None:
        out.say(harmless(f"{shown.group}/{shown.name}  ({shown.kind}, shared by {shown.shared_by})"))
        out.say(
            f"{sized(shown.size_bytes)} in {counted(shown.pieces, 'piece')} of {sized(shown.piece_bytes)}, {shown.algorithm}"
        )
        out.say(f"manifest {shown.manifest_id}")
        out.table(
            ("PEER", "USER", "PIECES", "COMPLETE"),
            [
                (each.peer_id[:12], each.user, each.pieces, "yes" if each.complete else "no")
                for each in swarm.peers
            ],
            empty="No peer has it at the moment.",
        )

    out.answer(document, for_people)


async def get(
    *shared: Annotated[str, Parameter(name="GROUP/NAME", required=True, help="One shared file, or several.")],
    output: Annotated[str, Parameter(name=["--output", "-o"], metavar="DIR", help="Into this folder.")] = ".",
    down: Annotated[str, Parameter(metavar="RATE", help="Receive at most this much per second (20M).")] = "",
    seed: Annotated[bool, Parameter(help="Go on sharing when complete, until Ctrl-C.")] = False,
    checksum: Annotated[bool, Parameter(help="Also tell the whole file's SHA-256.")] = False,
    listen: Annotated[str, Parameter(metavar="HOST:PORT", help="Where other peers reach this one.")] = "",
    advertise: Annotated[
        str, Parameter(metavar="URL,URL", help="As which addresses it is told to others.")
    ] = "",
    up: Annotated[str, Parameter(metavar="RATE", help="Send at most this much per second (20M).")] = "",
    common: Common = DEFAULTS,
) -> int:
    """Download shared files, from all their peers at once, every piece verified.

    Interrupted in any way, the same command again fetches only what is missing. A file appears under its
    name only when it is whole. Of several names the exit code is that of the first that failed.
    """
    out = Output.of(common)
    wanted = [group_and_name(each) for each in shared]
    settings = peer_settings(common, listen=listen, advertise=advertise, up=up)
    down_rate = rate(down) if down else 0
    exit_code = Exit.DONE
    async with peer_session(common, settings) as session:
        with Display(quiet=common.quiet, lines=not common.json) as display:

            async def fetch(group: str, name: str) -> GetReport:
                return await session.get(
                    group,
                    name,
                    Path(output).expanduser(),
                    down_bytes_per_second=down_rate,
                    checksum=checksum,
                    on_progress=display.update,
                )

            tasks = [asyncio.create_task(fetch(*each)) for each in dict.fromkeys(wanted)]
            try:
                for (group, name), task in zip(dict.fromkeys(wanted), tasks, strict=True):
                    try:
                        report = await task
                    except TrimaranError as error:
                        out.error(error)
                        exit_code = exit_code or error.exit_code
                        continue
                    _tell(out, group, name, report)
            except asyncio.CancelledError:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                display.close()
                raise TrimaranError(
                    "Interrupted; progress is kept.",
                    exit_code=Exit.INTERRUPTED,
                    code="interrupted",
                    hint="The same command again fetches only what is missing.",
                ) from None
        if seed and not session.remote and exit_code == Exit.DONE:
            out.note("Complete; sharing it with others. Ctrl-C ends it.")
            await until_cancelled(session.serve_forever())
    return exit_code


def _tell(out: Output, group: str, name: str, report: GetReport) -> None:
    import msgspec

    document = {"group": group, "name": name} | msgspec.to_builtins(report)
    if report.sha256 is None:
        del document["sha256"]

    def for_people() -> None:
        out.say(
            f"{harmless(report.path)}: {sized(report.size_bytes)}, verified, in {lasting(report.seconds)}"
        )
        if report.received_bytes and report.seconds > 0:
            out.say(
                f"  received {sized(report.received_bytes)} at {rated(report.received_bytes / report.seconds)}"
            )
        if report.reused_bytes:
            out.say(f"  {sized(report.reused_bytes)} were here already")
        for source in sorted(report.sources, key=lambda each: -each.bytes):
            who = harmless(source.user) or source.peer_id[:12]
            share_of = source.bytes / max(1, report.received_bytes)
            out.say(
                f"  from {who}: {sized(source.bytes)} ({share_of:.0%}), {counted(source.pieces, 'piece')}"
            )
        if report.sha256:
            out.say(f"  sha256 {report.sha256}")

    out.answer(document, for_people)
