"""The long-running peer and its limits."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import App, Parameter

from peer.reports import Exit, Limits, TrimaranError
from trimaran.output import Output, counted, rated
from trimaran.settings import DEFAULTS, Common, peer_settings, rate
from trimaran.wiring import peer_session, until_cancelled

app = App(name="peer", help="Run a peer, and limit what it sends and receives.")


@app.command
async def run(
    *,
    listen: Annotated[str, Parameter(metavar="HOST:PORT", help="Where other peers reach it.")] = "",
    advertise: Annotated[
        str, Parameter(metavar="URL,URL", help="As which addresses it is told to others.")
    ] = "",
    up: Annotated[str, Parameter(metavar="RATE", help="Send at most this much per second (20M).")] = "",
    up_each: Annotated[str, Parameter(metavar="RATE", help="The same for each downloader.")] = "",
    slots: Annotated[int, Parameter(metavar="N", help="Send at most so many pieces at once.")] = 0,
    down: Annotated[str, Parameter(metavar="RATE", help="Receive at most this much per second.")] = "",
    common: Common = DEFAULTS,
) -> None:
    """Share what was shared before, resume what was unfinished, and answer the other commands; until Ctrl-C.

    One line is printed when it is ready.
    """
    out = Output.of(common)
    settings = peer_settings(
        common, listen=listen, advertise=advertise, up=up, up_each=up_each, slots=slots, down=down
    )
    async with peer_session(common, settings) as session:
        if session.remote:
            raise TrimaranError(
                f"A peer already runs in the home {settings.home}.",
                exit_code=Exit.CONFLICT,
                code="home-in-use",
                hint="Stop it first, or give this one a home of its own with --home.",
            )
        peer_id = (await session.whoami()).peer_id

        def ready() -> None:
            out.answer(
                {"peer_id": peer_id, "listen": session.listen_address, "pid": os.getpid()},
                f"The peer {peer_id} serves at {session.listen_address} (process {os.getpid()}).",
            )

        await until_cancelled(session.serve_forever(ready))


@app.command
async def limits(
    *,
    up: Annotated[
        str, Parameter(metavar="RATE", help="Send at most this much per second; 0 is unlimited.")
    ] = "",
    up_each: Annotated[
        str, Parameter(metavar="RATE", help="Send at most this much per second to each downloader.")
    ] = "",
    slots: Annotated[
        int | None,
        Parameter(metavar="N", help="Send at most so many pieces at once; 0 is as many as the link needs."),
    ] = None,
    down: Annotated[str, Parameter(metavar="RATE", help="Receive at most this much per second.")] = "",
    common: Common = DEFAULTS,
) -> None:
    """Show or change this peer's limits. They are kept, and hold at once for a running peer."""
    async with peer_session(common) as session:
        now = await session.limits(None)
        if up or up_each or down or slots is not None:
            now = await session.limits(
                Limits(
                    up_bytes_per_second=rate(up) if up else now.up_bytes_per_second,
                    up_each_bytes_per_second=rate(up_each) if up_each else now.up_each_bytes_per_second,
                    up_slots=now.up_slots if slots is None else slots,
                    down_bytes_per_second=rate(down) if down else now.down_bytes_per_second,
                )
            )
    Output.of(common).answer(
        now,
        f"up {_limit(now.up_bytes_per_second)}, to each downloader {_limit(now.up_each_bytes_per_second)}, "
        f"{counted(now.up_slots, 'slot') if now.up_slots else 'as many slots as the link needs'}; "
        f"down {_limit(now.down_bytes_per_second)}",
    )


def _limit(bytes_per_second: int) -> str:
    return rated(bytes_per_second) if bytes_per_second else "unlimited"
