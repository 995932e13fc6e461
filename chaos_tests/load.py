"""How busy the machine itself was, recorded next to what it may explain. A bound on time is never loosened
for it; a reader of the report can tell the machine's lateness from the product's."""

from __future__ import annotations

import asyncio
import os
import resource

from chaos_tests.history import History, Load, Recorder

NAP_SECONDS = 0.5  # one after the other: whenever the rig stands still, it oversleeps one


async def feel(recorder: Recorder) -> None:
    """Until cancelled."""
    while True:
        before = recorder.now_ns()
        await asyncio.sleep(NAP_SECONDS)
        late = (recorder.now_ns() - before) / 1e9 - NAP_SECONDS
        recorder.add(Load(at_ns=before, runnable=os.getloadavg()[0], late_seconds=late))


def told(history: History) -> str:
    late = sorted(load.late_seconds * 1000 for load in history.loads) or [0.0]
    runnable = [load.runnable for load in history.loads] or [0.0]
    return (
        f"{os.cpu_count()} processors, {min(runnable):.1f} to {max(runnable):.1f} runnable (a minute's average); naps "
        f"of the rig overslept {late[len(late) // 2]:.0f} ms (median), {late[-1]:.0f} ms (most)"
    )


def used() -> str:
    """By the rig and by all it started, so far."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = [usage.ru_utime + usage.ru_stime for usage in (own, others)]
    return (
        f"{seconds[0]:.0f} s by the rig and its clients, {seconds[1]:.0f} s by trackers, peers and commands"
    )
