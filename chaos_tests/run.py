"""Run the whole system under faults, check its history, and write the report.

    python -m chaos_tests.run smoke|nightly|long [--seed N] [--seconds N] [--nodes N] [--out DIR]
    python -m chaos_tests.run namespaces [--seed N]   (root: trackers in network namespaces, packets lost by nftables)
    python -m chaos_tests.run canary [--seed N]

Exit 0 when every check held, 1 when one was violated or could not tell. `canary` runs a cluster with the Raft
corrections switched off, and exits 0 only when the checkers say no: it shows that they can.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from chaos_tests import compounds, ending, faults, load, namespaces, peer_faults, report, workload
from chaos_tests.checkers import availability, cluster, linearizability, product, revisions, watches
from chaos_tests.checkers.verdict import Verdict, held, violated
from chaos_tests.client import Api
from chaos_tests.history import History, Recorder
from chaos_tests.rig import Rig
from chaos_tests.swarm import LIES, Swarm
from chaos_tests.workload import World

MODELS: dict[str, tuple[linearizability.State, linearizability.Step]] = {
    "file": (linearizability.ABSENT, linearizability.file_model),
    "membership": ("none", linearizability.membership_model),
}
ABSENT = {kind: initial for kind, (initial, _) in MODELS.items()}
PLAYERS_REST_SECONDS = 3.0
EVERY_KIND_SECONDS_MIN = 1800.0
LEASE_SECONDS = 30.0
LEASE_SLACK_SECONDS = 25.0  # the renewal interval, the leader's own timing from its election, and a pause


@dataclass(frozen=True)
class Profile:
    seconds: float
    nodes: int
    groups: int
    users_per_group: int  # at most five play on one key
    peers: int
    files: int
    file_bytes: int
    upload_rate: str
    kinds: tuple[str, ...]
    operations_per_second_min: float
    linearizability_seconds: float
    peer_kinds: tuple[str, ...] = peer_faults.PLAIN
    raft_settings: Mapping[str, float] = field(default_factory=dict)
    every_kind: bool = False  # each must bite, in a run that is not shortened; else each that was tried
    fault_pause_seconds: tuple[float, float] = (0.5, 2.0)
    client_pause_seconds: float = 0.15  # on average, after each operation

    @property
    def is_whole(self) -> bool:
        """Long enough to try every kind several times."""
        return self.every_kind and self.seconds >= EVERY_KIND_SECONDS_MIN


# Beside a small log: or snapshots would grow beyond it, and none be made while a fault lasts.
REQUESTS_KEPT = 800
SMALL_LOG = {"log_bytes_before_snapshot": 48 << 10, "keep_tail_bytes": 16 << 10, "segment_bytes": 32 << 10}
SMOKE = Profile(75, 3, 3, 4, 4, 1, 24 << 20, "1M", faults.SMOKE, 5, 30)
CANARY = Profile(
    60, 3, 3, 4, 0, 0, 0, "",
    ("isolate the leader", "isolate the leader, incoming", "halves", "kill all", "kill a majority", "slow links"), 5, 30,
)  # fmt: skip
CANARY_OFF = (
    "truncate_only_conflicts,acks_carry_term,wait_for_sync,snapshot_never_commits,stable_repair_hint,read_barrier,"
    "apply_before_answer"
)
NIGHTLY = Profile(
    1800, 3, 4, 5, 6, 1, 48 << 20, "512K", tuple(compounds.KINDS), 5, 300, tuple(peer_faults.KINDS), SMALL_LOG,
    every_kind=True, fault_pause_seconds=(2.0, 6.0), client_pause_seconds=0.8,  # about 1,000 operations a key
)  # fmt: skip

NAMESPACES = Profile(
    150, 5, 3, 4, 4, 1, 24 << 20, "1M",
    ("isolate the leader", "isolate the leader, incoming", "isolate the leader, outgoing", "halves", "bridge",
     "majorities ring", "lost packets", "kill the leader", "pause 2 s", compounds.MINORITY_GONE,
     compounds.MAJORITY_GONE, "replace a node"),
    5, 60,
)  # fmt: skip


async def run(
    profile: Profile, seed: int, out: Path, corrections_off: str = "", make_rig: Callable[..., Rig] = Rig
) -> tuple[History, list[Verdict], list[str]]:
    """One run: set up, faults, heal, settle, check. Also what was not to be had here."""
    out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(out / "history.jsonl", seed)
    rig = make_rig(
        Path(tempfile.mkdtemp(prefix="trimaran-chaos-")),
        recorder,
        profile.nodes,
        seed,
        corrections_off=corrections_off,
        raft_settings=profile.raft_settings,
        requests_kept=REQUESTS_KEPT if profile.raft_settings else 0,
    )
    swarm: Swarm | None = None
    world: World | None = None
    tasks: list[asyncio.Task[object]] = []
    players: list[asyncio.Task[None]] = []
    stop_reading = asyncio.Event()
    reader: Api | None = None
    broken: list[Exception] = []
    whole = False
    try:
        await rig.set_up()
        world = World(recorder, rig.api, rig.node_ids, seed)
        await world.set_up(profile.groups, profile.users_per_group)
        if profile.peers:
            swarm = Swarm(
                rig.folder / "peers", recorder, rig.urls, rig.folder / "ca.pem", seed, profile.upload_rate
            )
            await swarm.set_up(
                profile.peers, profile.files, profile.file_bytes, hurt=bool(profile.raft_settings)
            )
            reader = rig.api()
            await reader.login(rig.node_ids[0], "swarm-0", workload.PASSWORD)
            tasks.append(asyncio.create_task(swarm.observe(reader, rig.node_ids, stop_reading)))
        for number, group in enumerate(world.groups):
            for k, user in enumerate(world.cast[group]):
                own_seed, pause = seed * 1000 + number * 10 + k, profile.client_pause_seconds
                players.append(asyncio.create_task(world.run_client(group, user, own_seed, pause)))
            for watcher in range(2):
                tasks.append(asyncio.create_task(world.watch(group, watcher)))
        print(f"set up in {recorder.now_ns() / 1e9:.1f} s; faults for {profile.seconds:.0f} s", flush=True)
        tasks.append(asyncio.create_task(load.feel(recorder)))
        begin = recorder.now_ns()
        downloads = await _under_faults(profile, seed, rig, swarm, recorder)
        rig.heal()
        await asyncio.gather(*(rig.start(node) for node in rig.node_ids))
        recorder.history.healed_ns = recorder.now_ns()
        await asyncio.sleep(3.0)  # the users go on for a moment after the faults, then rest
        world.stopping.set()
        await asyncio.wait(players, timeout=2 * workload.OPERATION_SECONDS + 1)
        await asyncio.sleep(PLAYERS_REST_SECONDS)  # the last writes are told to the watchers
        await _settle(rig, recorder, downloads)
        if swarm:
            swarm.tell_lies(begin)
        whole = True
    except Exception as error:  # there is a report on every run: what was seen until then is checked as well
        traceback.print_exc()
        broken.append(error)
    finally:
        stop_reading.set()
        if world:
            world.stopping.set()
            world.hang_up.set()
        await asyncio.sleep(0.5)
        broken += await ending.end([*tasks, *players])
        if swarm:
            await swarm.tear_down()
        if world:
            await world.close()
        if reader:
            await reader.close()
        broken += await rig.tear_down()
        history = recorder.close()
        if not whole:
            _keep(rig, out)
        if sys.exc_info()[0] is not None:
            _clean(rig, swarm)
    verdicts = [_ran(history, broken)]
    verdicts += check(history, profile, set(rig.node_ids), _expected(profile, rig, swarm, history))
    verdicts.append(product.check_logs(rig.folder))
    if any(verdict.result != "held" for verdict in verdicts):
        _keep(rig, out)
    _clean(rig, swarm)
    return history, verdicts, not_to_be_had(profile, rig, swarm)


def _keep(rig: Rig, out: Path) -> None:
    """Logs and data folders, next to the history."""
    rig.keep_logs(out)
    rig.keep_data(out / "data")


def _clean(rig: Rig, swarm: Swarm | None) -> None:
    rig.unmount()
    if swarm:
        swarm.unmount()
    shutil.rmtree(rig.folder, ignore_errors=True)


def _ran(history: History, broken: list[Exception]) -> Verdict:
    """Whether the run itself went as it should."""
    name = "the run went to its end"
    if broken:
        return violated(
            name, len(broken), "; ".join(f"{type(e).__name__}: {e}" for e in broken), history.end_ns
        )
    return held(name, 1)


def _expected(profile: Profile, rig: Rig, swarm: Swarm | None, history: History) -> set[str]:
    """The kinds of fault that must have bitten."""
    if not profile.is_whole:
        return {fault.kind for fault in history.faults}
    kinds = {name for name in profile.kinds if compounds.KINDS[name].needs(rig) is None}
    if swarm:
        kinds |= {*peer_faults.usable(swarm, profile.peer_kinds), LIES}
    return kinds


def not_to_be_had(profile: Profile, rig: Rig, swarm: Swarm | None) -> list[str]:
    """What this machine, or this kind of rig, cannot do."""
    needs = [f"{name}: {why}" for name in profile.kinds if (why := compounds.KINDS[name].needs(rig))]
    return sorted({*needs, *rig.missing, *(swarm.missing if swarm else [])})


async def _under_faults(
    profile: Profile, seed: int, rig: Rig, swarm: Swarm | None, recorder: Recorder
) -> list[asyncio.Task[object]]:
    """Inject faults one after another until the time is up; returns the downloads still under way."""
    chance = random.Random(seed)
    until = recorder.now_ns() + int(profile.seconds * 1e9)
    downloads: list[asyncio.Task[object]] = []
    hurting: asyncio.Task[None] | None = None
    if swarm:
        rig.downloads_go_on = swarm.go_on
        kinds = peer_faults.usable(swarm, profile.peer_kinds)
        hurting = asyncio.create_task(peer_faults.hurt(swarm, kinds, until, rig.peers_rest))
        # The smoke run downloads once; a long one again and again.
        rounds_until = until if profile.raft_settings else 0
        downloads.append(asyncio.create_task(swarm.rounds(profile.file_bytes, rounds_until)))
    usable = [name for name in profile.kinds if compounds.KINDS[name].needs(rig) is None]
    schedule = faults.Schedule(usable, seed, profile.fault_pause_seconds)
    while recorder.now_ns() <= until:
        pause, name = schedule.next()
        await asyncio.sleep(pause)
        for ended in await rig.restart_ended():
            print(f"{recorder.now_ns() / 1e9:7.1f} s  {ended.wrong}", flush=True)
        print(f"{recorder.now_ns() / 1e9:7.1f} s  {name}", flush=True)
        fault = await faults.run(rig, compounds.KINDS[name], chance)
        schedule.done(name, fault.bit)
        print(
            f"           {fault.target} {fault.detail}{'' if fault.bit else '  (did not bite)'}", flush=True
        )
    if hurting:
        await asyncio.wait_for(hurting, 600)  # the last one ends as it must
    return downloads


async def _settle(rig: Rig, recorder: Recorder, downloads: list[asyncio.Task[object]]) -> None:
    """Wait for what must come after the faults: agreement (checked from the samples), and the downloads."""
    nodes = set(rig.node_ids)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if cluster.check_liveness(recorder.history, nodes).result == "held":
            break
        await asyncio.sleep(0.2)
    if downloads:
        await asyncio.wait(downloads, timeout=240)
        for task in downloads:
            if task.done():
                task.result()


def check(history: History, profile: Profile, nodes: set[str], kinds: set[str]) -> list[Verdict]:
    """Every checker over the history."""
    log, verdicts = revisions.log_of(history)
    operations = history.operations
    verdicts += [
        revisions.check_order(operations),
        revisions.check_request_ids(operations),
        revisions.check_applied_once(operations, log),
        revisions.check_acknowledged(operations, log, workload.trace, history.watched),
        revisions.check_reads(operations, log, workload.fold, ABSENT, workload.path_of, history.watched),
        cluster.check_leaders(history.samples),
        cluster.check_digests(history.samples),
        cluster.check_liveness(history, nodes),
        product.check_removals(operations),
        product.check_leases(history.presences, history.lives, LEASE_SECONDS + LEASE_SLACK_SECONDS, 5.0),
        product.check_transfers(history.transfers),
        product.check_deadlines(operations, history.loads),
        availability.check_minority_gone(history, compounds.MINORITY_GONE),
        availability.check_majority_gone(
            history, compounds.MAJORITY_GONE, profile.peer_kinds, must_see_downloads=profile.is_whole
        ),
        product.check_nodes(history.faults),
    ]
    verdicts += watches.check(history.watched, log)
    verdicts += linearizability.check_keys(
        [o for o in operations if o.name != "access"], MODELS, profile.linearizability_seconds
    )
    verdicts.append(product.check_honesty(history, profile.operations_per_second_min, kinds))
    return verdicts


def figures(history: History, verdicts: list[Verdict]) -> dict[str, str]:
    ends = Counter(operation.end for operation in history.operations)
    kinds = Counter(fault.kind for fault in history.faults if fault.bit)
    whole = [transfer for transfer in history.transfers if transfer.got_sha256]
    return {
        "seed": str(history.seed),
        "seconds": f"{history.end_ns / 1e9:.0f}",
        "operations": f"{len(history.operations):,} ({', '.join(f'{n:,} {end}' for end, n in sorted(ends.items()))})",
        "watch messages": f"{len(history.watched):,}",
        "faults that bit": ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none",
        "downloads": f"{len(whole)} of {len(history.transfers)}, {sum(t.size_bytes for t in whole):,} bytes",
        "machine": load.told(history),
        "processor": load.used(),
        "violations": str(sum(verdict.result == "violated" for verdict in verdicts)),
        "could not tell": str(sum(verdict.result == "unknown" for verdict in verdicts)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos_tests.run", description=__doc__.splitlines()[0])
    parser.add_argument("profile", choices=["smoke", "nightly", "long", "canary", "namespaces"])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--out", type=Path, default=Path("chaos-report"))
    options = parser.parse_args()
    ending.prepare()
    seed = options.seed if options.seed is not None else int(time.time())
    profile = {"smoke": SMOKE, "canary": CANARY, "namespaces": NAMESPACES}.get(options.profile, NIGHTLY)
    canary = options.profile == "canary"
    changes = {"seconds": options.seconds, "nodes": options.nodes}
    profile = replace(profile, **{name: value for name, value in changes.items() if value})
    out = options.out / f"{options.profile}-{seed}"
    replay = f"python -m chaos_tests.run {options.profile} --seed {seed} --seconds {profile.seconds:.0f} --nodes {profile.nodes}"
    if options.profile == "namespaces":
        try:
            with namespaces.Network([f"n{i + 1}" for i in range(profile.nodes)]) as network:
                network.enter()
                make_rig = partial(namespaces.NamespaceRig, network)
                history, verdicts, missing = ending.run(run(profile, seed, out, make_rig=make_rig))
        except namespaces.Unavailable as reason:
            print(f"SKIPPED: {reason}")
            return 0
    else:
        history, verdicts, missing = ending.run(run(profile, seed, out, CANARY_OFF if canary else ""))
    told = figures(history, verdicts) | {"not to be had here": "; ".join(missing) or "nothing"}
    report.write(
        out / "report.html",
        history,
        verdicts,
        title=f"Trimaran under faults: {options.profile}, seed {seed}",
        replay=replay,
        figures=told,
    )
    for name, value in told.items():
        print(f"{name:>16}: {value}")
    bad = [verdict for verdict in verdicts if verdict.result != "held"]
    for verdict in bad:
        print(f"{verdict.result.upper()}: {verdict.name}: {verdict.message}", file=sys.stderr)
    print(f"report: {out / 'report.html'}")
    if bad:
        print(f"again:  {replay}", file=sys.stderr)
    if canary:
        caught = any(verdict.result == "violated" for verdict in bad)
        print(
            "the checkers said no, as they must"
            if caught
            else "THE CANARY LIVES: the suite has lost its teeth"
        )
        return 0 if caught else 1
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
