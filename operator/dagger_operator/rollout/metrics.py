"""A worker's Prometheus metrics (docs/metrics.md). Label values are bounded: no task, rollout or run names."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dagger_operator.store.layout import Kind
from dagger_operator.store.records import Outcome

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


DONE, BROKEN = "Done", "Broken"
"""How a try can end."""


class WorkerMetrics:
    """Metrics of one worker process. Series with a closed set of label values exist from the start, at 0: a counter that appears at 1 shows
    no increase. Failure reasons come from many places and appear with their first failure, so alerts use tries that are `BROKEN`."""

    def __init__(self, registry: CollectorRegistry, kind: Kind) -> None:
        self._kind = kind
        self._rollouts = Counter("dagger_rollouts", "Rollouts that this worker recorded.", ["kind", "outcome"], registry=registry)
        self._failures = Counter(
            "dagger_infrastructure_failures", "Tries that infrastructure broke.", ["kind", "reason"], registry=registry
        )
        self.under_way = Gauge("dagger_rollouts_under_way", "Rollouts under way.", ["kind"], registry=registry).labels(kind)
        self._seconds = _histogram("dagger_rollout_seconds", "One try, from claim to its end.", registry, "kind", "outcome")
        self.create_seconds = _histogram("dagger_sandbox_create_seconds", "Until an agent's sandbox answered.", registry)
        self.start_seconds = _histogram("dagger_sandbox_start_seconds", "From then until the agent might begin.", registry)
        self.command_seconds = _histogram("dagger_sandbox_command_seconds", "Commands of agents.", registry)
        self.grade_seconds = _histogram("dagger_grade_seconds", "A grade, its sandbox included.", registry)
        for outcome in Outcome:
            self._rollouts.labels(kind, outcome)
        for end in (DONE, BROKEN):
            self._seconds.labels(kind, end)

    def ended(self, outcome: Outcome) -> None:
        self._rollouts.labels(self._kind, outcome).inc()

    def tried(self, seconds: float, broken_by: str | None) -> None:
        """Record one try. `broken_by`: reason of the infrastructure failure, from a bounded set."""
        self._seconds.labels(self._kind, BROKEN if broken_by else DONE).observe(seconds)
        if broken_by:
            self._failures.labels(self._kind, broken_by).inc()


def _histogram(name: str, what: str, registry: CollectorRegistry, *labels: str) -> Histogram:
    return Histogram(name, what, labels, buckets=SECONDS, registry=registry)
