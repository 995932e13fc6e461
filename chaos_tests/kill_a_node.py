"""Kill a tracker every five seconds while six peers exchange files, and compare with the same without kills.

    python -m chaos_tests.kill_a_node [--seed N] [--kills 12] [--out DIR]

Six peers share a file each and fetch all the others', upload limited so low that it lasts more than a minute and that
the links, not two processors, are what limits. At least ten kills, every other one of whoever leads then; every node is
started again. It holds when all downloads end with the right bytes, the slowest within 1.1 times the time without
kills, and no acknowledged write is lost (clients go on writing through it all).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
from pathlib import Path

from chaos_tests import ending, faults, load, report, workload
from chaos_tests.checkers import cluster, product, revisions
from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.history import History, Recorder
from chaos_tests.rig import Rig
from chaos_tests.swarm import Swarm
from chaos_tests.workload import World

PEERS = 6
FILE_BYTES = 30 << 20
UPLOAD = "2M"  # each peer must send about five files' worth: 150 MiB at 2 MiB/s is 75 s
KILL_EVERY_SECONDS = 5.0
SLOWER_MAX = 1.1


async def once(seed: int, kills: int, out: Path) -> tuple[History, float, list[Verdict]]:
    """One exchange; returns its history, the slowest download's seconds, and the verdicts."""
    out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(out / "history.jsonl", seed)
    rig = Rig(Path(tempfile.mkdtemp(prefix="trimaran-chaos-")), recorder, 3, seed)
    swarm: Swarm | None = None
    world: World | None = None
    players: list[asyncio.Task[None]] = []
    try:
        await rig.set_up()
        world = World(recorder, rig.api, rig.node_ids, seed)
        await world.set_up(1, 4)
        swarm = Swarm(rig.folder / "peers", recorder, rig.urls, rig.folder / "ca.pem", seed, UPLOAD)
        await swarm.set_up(PEERS, PEERS, FILE_BYTES, seeders_per_file=1)
        group = world.groups[0]
        players = [
            asyncio.create_task(world.run_client(group, user, seed * 100 + k, 0.1))
            for k, user in enumerate(world.cast[group])
        ] + [asyncio.create_task(world.watch(group, 0)), asyncio.create_task(load.feel(recorder))]
        begin = recorder.now_ns()
        downloads = [
            asyncio.create_task(swarm.download(peer, name, 400))
            for number, peer in enumerate(swarm.peers.values())
            for index, name in enumerate(swarm.files)
            if index != number
        ]
        if kills:
            await _kill(rig, random.Random(seed), kills)
        transfers = await asyncio.gather(*downloads)
        slowest = (max(transfer.end_ns for transfer in transfers) - begin) / 1e9
        recorder.history.healed_ns = recorder.now_ns()
        world.stopping.set()
        await asyncio.sleep(2)  # the last writes are told to the watcher
    finally:
        if world:
            world.stopping.set()
            world.hang_up.set()
        await ending.end(players)
        if swarm:
            await swarm.tear_down()
        if world:
            await world.close()
        await rig.tear_down()
        history = recorder.close()
        rig.keep_logs(out)
        rig.unmount()
        shutil.rmtree(rig.folder, ignore_errors=True)
    log, verdicts = revisions.log_of(history)
    verdicts += [
        product.check_transfers(history.transfers),
        revisions.check_acknowledged(history.operations, log, workload.trace, history.watched),
        revisions.check_order(history.operations),
        cluster.check_leaders(history.samples),
        cluster.check_digests(history.samples),
        product.check_deadlines(history.operations, history.loads),
    ]
    return history, slowest, verdicts


async def _kill(rig: Rig, chance: random.Random, kills: int) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number in range(kills):
        due += KILL_EVERY_SECONDS
        await asyncio.sleep(max(0.0, due - loop.time()))
        kind = "kill one" if number % 2 else "kill the leader"
        fault = await faults.run(rig, faults.KINDS[kind], chance)
        print(f"{rig.recorder.now_ns() / 1e9:7.1f} s  {kind}: {fault.target}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m chaos_tests.kill_a_node", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("chaos-report"))
    options = parser.parse_args()
    ending.prepare()
    _, calm, calm_verdicts = ending.run(once(options.seed, 0, options.out / "calm"))
    print(f"without kills: the slowest download took {calm:.1f} s", flush=True)
    history, hurt, verdicts = ending.run(once(options.seed, options.kills, options.out / "kill-a-node"))
    bit = [fault for fault in history.faults if fault.bit]
    leaders = sum(fault.kind == "kill the leader" for fault in bit)
    message = f"{calm:.1f} s without kills, {hurt:.1f} s with {len(bit)} kills ({leaders} of leaders): {hurt / calm:.3f}"
    enough = len(bit) >= 10 and leaders * 3 >= len(bit) and hurt >= 60
    verdicts.append(
        held("as fast as without kills", len(bit), message)
        if hurt <= calm * SLOWER_MAX and enough
        else violated("as fast as without kills", len(bit), message)
    )
    verdicts += [verdict for verdict in calm_verdicts if verdict.result != "held"]
    told = {
        "slowest download": message,
        "downloads": str(len(history.transfers)),
        "kills": str(len(bit)),
        "machine": load.told(history),
    }
    path = options.out / "kill-a-node" / "report.html"
    replay = f"python -m chaos_tests.kill_a_node --seed {options.seed} --kills {options.kills}"
    report.write(
        path,
        history,
        verdicts,
        title="Trimaran: a tracker killed every five seconds",
        replay=replay,
        figures=told,
    )
    print(message)
    for verdict in verdicts:
        if verdict.result != "held":
            print(f"{verdict.result.upper()}: {verdict.name}: {verdict.message}", file=sys.stderr)
    print(f"report: {path}")
    return int(any(verdict.result != "held" for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
