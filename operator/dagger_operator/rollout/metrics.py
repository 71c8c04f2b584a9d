"""Prometheus metrics of a worker. Labels are bounded: no task, no rollout, no run."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


class WorkerMetrics:
    """Of one worker process, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.rollouts = Counter("dagger_rollouts", "Rollouts finished by this worker.", ["kind", "outcome"], registry=registry)
        self.failures = Counter("dagger_rollout_failures", "Tries that infrastructure broke.", ["kind"], registry=registry)
        self.under_way = Gauge("dagger_rollouts_under_way", "Rollouts under way in this worker.", registry=registry)
        self.rollout_seconds = Histogram("dagger_rollout_seconds", "From claim to record.", ["kind"], buckets=SECONDS, registry=registry)
        self.sandbox_seconds = Histogram(
            "dagger_sandbox_create_seconds", "Until a sandbox was ready for commands.", buckets=SECONDS, registry=registry
        )
        self.command_seconds = Histogram("dagger_sandbox_command_seconds", "Commands of agents.", buckets=SECONDS, registry=registry)
