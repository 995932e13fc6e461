"""What an operator can see in numbers: `/metrics`, in Prometheus' text format.

Owned here: names, labels, and counting requests at little cost. The gauges are read when they are asked
for, from the state, the hub and consensus, so they cost nothing in between.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.consensus import Role
from state_machine import queries

if TYPE_CHECKING:
    from cluster.service import Service

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class _Latency:
    """A histogram of one route. Each slot counts what fell between two bounds."""

    __slots__ = ("slots", "sum_seconds")

    def __init__(self) -> None:
        self.slots = [0] * (len(_SECONDS) + 1)
        self.sum_seconds = 0.0


class Metrics(Collector):
    """Counts in plain dicts, for they are raised with every request; one registry for one node, for
    several nodes may live in one process (tests)."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests: dict[tuple[str, int], int] = {}
        self._latencies: dict[str, _Latency] = {}
        self._proposals: dict[str, int] = {}

    def request(self, route: str, status: int, seconds: float) -> None:
        key = (route, status)
        self._requests[key] = self._requests.get(key, 0) + 1
        latency = self._latencies.get(route)
        if latency is None:
            latency = self._latencies[route] = _Latency()
        latency.slots[bisect_left(_SECONDS, seconds)] += 1
        latency.sum_seconds += seconds

    def proposal(self, end: str) -> None:
        self._proposals[end] = self._proposals.get(end, 0) + 1

    def attach(self, service: Service) -> None:
        self._registry.register(_Gauges(service))

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "trimaran_http_requests", "Requests answered", labels=["route", "status"]
        )
        for (route, status), count in self._requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        latencies = HistogramMetricFamily(
            "trimaran_http_request_seconds",
            "Time from the request's headers to its answer",
            labels=["route"],
        )
        for route, latency in self._latencies.items():
            totals = list(accumulate(latency.slots))
            bounds = [*(str(bound) for bound in _SECONDS), "+Inf"]
            latencies.add_metric([route], list(zip(bounds, totals, strict=True)), latency.sum_seconds)
        yield latencies
        proposals = CounterMetricFamily("trimaran_proposals", "Proposals by their end", labels=["end"])
        for end, count in self._proposals.items():
            proposals.add_metric([end], count)
        yield proposals


class _Gauges(Collector):
    """Read when asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        service = self._service
        status = service.consensus.status()
        yield _gauge("trimaran_revision", "The state machine's revision", service.machine.revision)
        yield _gauge("trimaran_raft_term", "Raft's term", status.term)
        yield _gauge("trimaran_raft_applied", "Raft index of the last entry applied", status.applied)
        yield _gauge("trimaran_raft_committed", "Raft index of the last entry committed", status.committed)
        yield _gauge("trimaran_raft_quorum", "1 while a quorum is heard", int(status.quorum))
        yield _gauge("trimaran_disk_full", "1 while the disk is full", int(status.disk_full))
        yield _gauge("trimaran_ready", "1 while the node can answer", int(not service.unready_reason()))
        held_seconds, used_seconds = service.loop_probe.longest()
        yield _gauge(
            "trimaran_loop_block_seconds_max", "Longest hold of the event loop, lately", held_seconds
        )
        yield _gauge("trimaran_loop_block_cpu_seconds", "Processor time used in that hold", used_seconds)
        role = GaugeMetricFamily("trimaran_raft_role", "1 for the node's role", labels=["role"])
        for known in Role:
            role.add_metric([known.value], int(known is status.role))
        yield role
        yield _gauge("trimaran_watchers", "Open event streams", len(service.hub))
        yield _gauge("trimaran_watch_floor", "Revision before which no history is kept", service.hub.floor)
        cuts = GaugeMetricFamily("trimaran_watch_cuts", "Event streams ended by this node", labels=["reason"])
        for reason, count in service.hub.cuts.items():
            cuts.add_metric([reason], count)
        yield cuts
        yield _gauge("trimaran_announcements_local", "Answered without the log", service.announcer.local)
        yield _gauge("trimaran_announcements_logged", "That changed something", service.announcer.logged)
        facts = GaugeMetricFamily("trimaran_state", "How many of what the state holds", labels=["kind"])
        for kind, count in queries.counts(service.machine.state).items():
            facts.add_metric([kind], count)
        yield facts


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)
