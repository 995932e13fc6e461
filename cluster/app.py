"""A tracker node as a process: everything is put together here, started in order, and stopped in order.

Owned here: assembly, the process's lock on its data folder, signals, the exit code. Left to others: what
each part does.

Stopping (SIGTERM, SIGINT) costs no request: leadership is handed over while this node still answers,
then watches end (their readers go to another node), then what is in work is finished, then Raft stops.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from cluster import tls
from cluster.api import certificates
from cluster.api.certificates import CertificateProblem
from cluster.config import ClusterFacts, HostPort, NodeConfig, raft_settings, service_settings
from cluster.consensus import Consensus, ConsensusStartError, MembershipError, NodeInfo
from cluster.joining import NodeAuthority
from cluster.renewal import Renewal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web


_log = structlog.get_logger("cluster.app")

HAND_OVER_SECONDS = 2.0
STOP_SECONDS_MAX = 30.0
FATAL_STOP_SECONDS_MAX = 5.0
BACKLOG = 1024
TOLD_EVERY_SECONDS = 10.0
_NO_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class NodeError(Exception):
    """The node cannot run, or had to end; the message says what, where and what to do. For people."""


class NodeConflictError(NodeError):
    """Another process holds what the node needs: its data folder, or its port."""


@dataclass(frozen=True, slots=True)
class Running:
    """What is told when the node serves."""

    node_id: str
    http: str
    raft: str
    pid: int
    data_dir: Path


def run_node(config: NodeConfig, ready: Callable[[Running], None], *, stop_with_stdin: bool = False) -> None:
    """Run until SIGTERM or SIGINT. Raises `NodeError`. `stop_with_stdin`: end as well when standard input
    does, for a parent that may die without a word."""
    configure_log(config.log_level)
    with lock_folder(config), _collector():
        asyncio.run(_run(config, ready, stop_with_stdin=stop_with_stdin))


async def _run(config: NodeConfig, ready: Callable[[Running], None], *, stop_with_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopTrouble())
    ending: asyncio.Future[str] = loop.create_future()
    with _signals(ending), _stdin(ending) if stop_with_stdin else nullcontext():
        async with assemble(config, fatal=lambda reason: _end(ending, reason)) as running:
            ready(running)
            tell_manager("READY=1")
            reason = await ending
            tell_manager("STOPPING=1")
            _log.info("stopping", reason=reason or "asked to")
    if reason:
        raise NodeError(reason)


def _end(ending: asyncio.Future[str], reason: str) -> None:
    """`reason` is empty when the end was asked for."""
    if not ending.done():
        ending.set_result(reason)


def _end_in_any_case(reason: str) -> None:
    """What cannot finish must not keep a node that is of no use any more from being started again."""

    def end() -> None:
        _log.error("stopping took too long; ending now", seconds=STOP_SECONDS_MAX)
        os._exit(1)

    timer = threading.Timer(FATAL_STOP_SECONDS_MAX if reason else STOP_SECONDS_MAX, end)
    timer.daemon = True
    timer.start()


@asynccontextmanager
async def assemble(config: NodeConfig, fatal: Callable[[str], None]) -> AsyncIterator[Running]:
    """A node that serves while the context is open. Raises `NodeError` when it cannot start."""
    # Late, so that `tracker init` and `--help` do not pay for them.
    from aiohttp import web

    from cluster.http import make_runner
    from cluster.raft.node import open_node
    from cluster.service import Service
    from state_machine.machine import StateMachine

    facts = ClusterFacts.load(config.folder)
    identity = _Identity.load(config)
    machine = StateMachine()
    begun = config.folder.begun
    settings = raft_settings(
        config, facts.cluster_id, identity.info, tuple(facts.members), may_create=not begun.exists()
    )
    consensus: Consensus = open_node(
        settings,
        machine,
        data_dir=config.folder.raft,
        listen=(config.raft_listen.host, config.raft_listen.port),
        server_tls=identity.raft_server,
        client_tls=identity.raft_client,
    )
    consensus.on_fatal(fatal)
    authority = None
    if not config.insecure:
        authority = NodeAuthority(
            config.folder,
            node_id=config.node_id,
            http=config.http,
            cluster_id=facts.cluster_id,
            consensus=consensus,
        )
    service = Service(consensus, machine, service_settings(config, facts.cluster_id), authority)
    machine.follow(service.hub.publish, lambda: _restored(service.hub.restored))
    runner = make_runner(service)
    listener = _listen(config.http_listen)
    try:
        await consensus.start()
    except ConsensusStartError as error:
        listener.close()
        raise NodeError(str(error)) from error
    try:
        certificates.write_durably(begun, b"")
        gc.freeze()  # what was loaded stays; collections need not walk it
        await service.start()
        await runner.setup()
        site = web.SockSite(runner, listener, ssl_context=identity.https, backlog=BACKLOG)
        await site.start()
        renewal = Renewal(config, identity.contexts, authority.reload if authority else lambda: None)
        if authority is not None:
            renewal.start()
            authority.admit_in_background()
        yield Running(config.node_id, config.http, str(config.raft), os.getpid(), config.data_dir)
        await renewal.stop()
        if authority is not None:
            await authority.stop()
        await _hand_over(consensus)
        await service.stop()
        await site.stop()
    finally:
        listener.close()
        await service.stop()
        await _shut(runner)
        await consensus.stop()


def _restored(told: Callable[[], None]) -> None:
    """A snapshot has replaced the state. As at the start, what was loaded stays: a full collection that walked
    over a million rows would hold up everything for a tenth of a second."""
    told()
    gc.freeze()


async def _hand_over(consensus: Consensus) -> None:
    """Before anything is closed: a new leader first, so that nobody's write meets a gap."""
    if consensus.is_leader() and len(consensus.status().nodes) > 1:
        try:
            await consensus.transfer_leadership(None, deadline_seconds=HAND_OVER_SECONDS)
        except MembershipError as error:
            _log.info("leadership was not handed over", reason=str(error))


async def _shut(runner: web.ServerRunner) -> None:
    if runner.server is not None:
        await runner.cleanup()


def tell_manager(state: str) -> None:
    """systemd's notification protocol (sd_notify(3)); nothing when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier, suppress(OSError):
            notifier.sendto(state.encode(), address.replace("@", "\0", 1))


# --- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Identity:
    info: NodeInfo
    https: ssl.SSLContext | None
    raft_server: ssl.SSLContext | None
    raft_client: ssl.SSLContext | None

    @property
    def contexts(self) -> list[ssl.SSLContext]:
        return [c for c in (self.https, self.raft_server, self.raft_client) if c is not None]

    @classmethod
    def load(cls, config: NodeConfig) -> _Identity:
        folder = config.folder
        if config.insecure:
            return cls(NodeInfo(config.node_id, str(config.raft), config.http, ""), None, None, None)
        try:
            certificate = certificates.load_certificate(folder.certificate)
            named = certificates.identity_of(certificate, certificates.NODE_URI)
            if named != config.node_id:
                raise NodeError(f"{folder.certificate} is for node {named}, not for {config.node_id}")
            if certificate.not_valid_after_utc <= tls.utc_now():
                _log.warning("this node's certificate has ended; it is renewed if the CA's key is here")
            fingerprint = certificates.key_fingerprint(certificate.public_key())
            files = folder.ca, folder.certificate, folder.key
            return cls(
                NodeInfo(config.node_id, str(config.raft), config.http, fingerprint),
                tls.https_context(*files),
                tls.raft_server_context(*files),
                tls.raft_client_context(*files),
            )
        except CertificateProblem as error:
            raise NodeError(str(error)) from error


def _listen(address: HostPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise NodeConflictError(
            f"cannot listen for users on {address}: {error.strerror or error}; stop what uses that port, or give "
            "another with --http"
        ) from error


@contextmanager
def lock_folder(config: NodeConfig) -> Iterator[None]:
    """One process for one data folder. Raises `NodeError` when another holds it."""
    ClusterFacts.load(config.folder)
    path = config.folder.lock
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NodeError(f"cannot use the data folder {config.data_dir}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise NodeConflictError(
                f"a node already runs on {config.data_dir}{f' (process {holder})' if holder else ''}; "
                "one data folder is for one process"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _signals(ending: asyncio.Future[str]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, ending, "")
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


@contextmanager
def _stdin(ending: asyncio.Future[str]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    descriptor = sys.stdin.fileno()

    def readable() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            _end(ending, "")

    loop.add_reader(descriptor, readable)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)


@contextmanager
def _collector() -> Iterator[None]:
    """A full collection over a large state holds the interpreter for tens of milliseconds: make it rare."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class LoopTrouble:
    """The event loop's exception handler. Out of file descriptors, asyncio tells of it a thousand times in a row, each
    with a traceback, and does little else meanwhile: here it is a line now and then."""

    def __init__(self) -> None:
        self._told_at = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_RESOURCES:
            loop.default_exception_handler(context)
        elif loop.time() - self._told_at >= TOLD_EVERY_SECONDS:
            self._told_at = loop.time()
            _log.warning("new connections must wait", reason=error.strerror)


def configure_log(level: str) -> None:
    """One JSON line for each event, on standard error; ours and the libraries'."""
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.PositionalArgumentsFormatter(),
                *shared,
                structlog.processors.format_exc_info,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.getLogger("asyncio").setLevel(max(number, logging.WARNING))
    logging.getLogger("aiohttp").setLevel(max(number, logging.WARNING))
