"""Metrics read from the operator's state at scrape time, so that what no longer exists is not reported."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dagger_operator.api import Phase
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.gpus import USES, held
from dagger_operator.cluster.health import Health
from dagger_operator.cluster.queue import WorkQueue
from dagger_operator.control import ConditionType


class Readings(Collector):
    def __init__(self, cache: Cache, queue: WorkQueue[RunKey], health: Health) -> None:
        self._cache, self._queue, self._health = cache, queue, health

    def collect(self) -> Iterator[Metric]:
        yield _gauge("dagger_operator_leading", "1 in the replica that holds the Lease.", float(self._health.leads()))
        yield _gauge("dagger_operator_watch_age_seconds", "Since a watch last heard anything.", self._health.streams.silence)
        yield _gauge("dagger_operator_event_loop_lag_seconds", "How late the last timer was.", self._health.lag)
        depth = GaugeMetricFamily("workqueue_depth", "Runs that are due and wait for a worker.", labels=["name"])
        depth.add_metric(["runs"], self._queue.depth)
        yield depth
        gpus = GaugeMetricFamily("dagger_gpus", "GPUs held now, by use.", labels=["use"])
        now = held(self._cache.of_kind("Pod"))
        for use in USES:
            gpus.add_metric([use], float(now[use]))
        yield gpus
        yield from self._runs(self._cache.of_kind("DAggerRun"))

    def _runs(self, runs: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
        tally: Counter[str] = Counter()
        info = GaugeMetricFamily("dagger_run_info", "1 for each run.", labels=["run_namespace", "run", "phase", "reason"])
        for run in runs:
            status = run.get("status") or {}
            phase = str(status.get("phase") or Phase.PENDING)
            tally[phase] += 1
            info.add_metric([run["metadata"]["namespace"], run["metadata"]["name"], phase, _reason(status)], 1.0)
        by_phase = GaugeMetricFamily("dagger_runs", "Runs by phase.", labels=["phase"])
        for one in Phase:
            by_phase.add_metric([one.value], float(tally[one.value]))
        yield by_phase
        yield info


def _reason(status: Mapping[str, Any]) -> str:
    """Return the reason of a run that does not progress; empty if it does."""
    conditions = status.get("conditions") or ()
    progresses = any(one["type"] == ConditionType.PROGRESSING and one["status"] == "True" for one in conditions)
    return "" if progresses else str(status.get("reason") or "")


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
