"""What this peer shares and downloads: the list, pausing, resuming, dropping, checking."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

from cyclopts import Parameter

from peer.reports import Exit, PeerSession, PsRow, State, TrimaranError
from trimaran.output import Output, harmless, rated, sized
from trimaran.progress import WIDE_COLUMNS, Display, piece_map_line
from trimaran.settings import DEFAULTS, Common, group_and_name
from trimaran.wiring import known_revision, peer_session

SharedName = Annotated[str, Parameter(name="GROUP/NAME", help="A share or download of this peer.")]

_RUNNING = frozenset({State.HASHING, State.DOWNLOADING, State.VERIFYING})


def sign(row: PsRow) -> str:
    """[D] running, [C] complete, else the reason."""
    if row.state in _RUNNING:
        return "[D]"
    if row.state is State.COMPLETE:
        return "[C]"
    return f"[{row.state.value}{f': {row.reason}' if row.reason else ''}]"


async def ps(*, common: Common = DEFAULTS) -> None:
    """List the downloads and shares of this peer.

    [D] is running, [C] is complete (and shared while the peer runs); any other state says its reason.
    """
    async with peer_session(common) as session:
        rows = await session.ps()
    out = Output.of(common)

    def for_people() -> None:
        from trimaran.output import console

        columns = console().width
        wide = WIDE_COLUMNS <= columns < 1000
        out.table(
            ("STATE", "NAME", "DONE", "SIZE", "DOWN", "UP", "PEERS", *(("PIECES",) if wide else ())),
            [
                (
                    sign(row),
                    f"{row.group}/{row.name}",
                    f"{row.done_bytes / row.size_bytes if row.size_bytes else 1:.0%}",
                    sized(row.size_bytes),
                    rated(row.rate_bytes_per_second),
                    rated(row.upload_bytes_per_second),
                    row.peers,
                    *((piece_map_line(row.piece_map, min(32, columns - 90)),) if wide else ()),
                )
                for row in rows
            ],
            empty="Nothing is downloaded or shared here.",
        )

    out.answer(rows, for_people)


async def pause(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Pause a download. What is complete stays, and stays offered."""
    await _change(shared, common, "paused", lambda session, group, name: session.pause(group, name))


async def resume(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Go on with a paused download."""
    await _change(shared, common, "resumed", lambda session, group, name: session.resume(group, name))


async def cancel(shared: SharedName, /, *, common: Common = DEFAULTS) -> None:
    """Give a download up and delete its unfinished part."""
    await _change(shared, common, "cancelled", lambda session, group, name: session.cancel(group, name))


async def verify(shared: SharedName, /, *, common: Common = DEFAULTS) -> int:
    """Read a share or download again and check every piece. Exit code 8 when something is not as it was."""
    group, name = group_and_name(shared)
    async with peer_session(common) as session:
        with Display(quiet=common.quiet) as display:
            row = await session.verify(group, name, display.update)
    if row.state in (State.CHANGED, State.MISSING, State.FAILED):
        raise TrimaranError(
            f"{shared} is not as it was: {row.reason or row.state.value}.",
            exit_code=Exit.INTEGRITY,
            code="integrity",
            hint="Share it again, or get it again: only what is wrong is fetched.",
        )
    told = f"{harmless(shared)}: {sized(row.done_bytes)} of {sized(row.size_bytes)} verified"
    Output.of(common).answer(row, told)
    return Exit.DONE


async def _change(
    shared: str,
    common: Common,
    done: str,
    change: Callable[[PeerSession, str, str], Awaitable[None]],
) -> None:
    group, name = group_and_name(shared)
    async with peer_session(common) as session:
        _, revision = await asyncio.gather(change(session, group, name), known_revision(common))
    Output.of(common).answer({"revision": revision}, f"{harmless(shared)} is {done}.")
