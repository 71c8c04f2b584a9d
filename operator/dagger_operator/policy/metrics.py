"""What the gateway tells Prometheus. Every label has a bounded set of values; no run, task or rollout is named."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class GatewayMetrics:
    """The gateway's metrics in a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("dagger_gateway_sessions", "Open rollouts", registry=registry)
        self.turns = Counter("dagger_gateway_turns", "Turns by who acted", ["actor"], registry=registry)
        self.upstream_seconds = Histogram(
            "dagger_gateway_upstream_seconds", "Seconds of a successful request to a policy", ["role"], buckets=_SECONDS, registry=registry
        )
        self.retries = Counter(
            "dagger_gateway_retries", "Requests to a policy that were tried again", ["role", "reason"], registry=registry
        )
        self.failures = Counter(
            "dagger_gateway_failures", "Requests to a policy that failed for good", ["role", "reason"], registry=registry
        )
        self.label_seconds = Histogram(
            "dagger_gateway_label_seconds", "Seconds from asking for a label to having it", buckets=_SECONDS, registry=registry
        )
        self.labels = Counter("dagger_gateway_labels", "Labels by flaw; None can be trained on", ["flaw"], registry=registry)
