"""The gateway's Prometheus metrics (docs/metrics.md). Label values are bounded: no run, task or rollout names."""

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dagger_operator.api import Role
from dagger_operator.store.records import Completion, LabelFlaw

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)


class Purpose(StrEnum):
    """What a policy is asked for. If the teacher acts, action and label are one request, counted as an action."""

    ACTION = "action"
    LABEL = "label"


class GatewayMetrics:
    """The gateway's metrics in the caller's registry. Series with a closed set of label values exist from the start, at 0."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("dagger_gateway_sessions", "Open rollouts.", registry=registry)
        self.turns = Counter("dagger_gateway_turns", "Turns, by who acted.", ["actor"], registry=registry)
        self.retries = Counter(
            "dagger_gateway_retries", "Requests to a policy that were tried again.", ["role", "reason"], registry=registry
        )
        self.failures = Counter(
            "dagger_gateway_failures", "Requests to a policy that failed for good.", ["role", "reason"], registry=registry
        )
        self._seconds = Histogram(
            "dagger_gateway_request_seconds",
            "Successful requests to a policy.",
            ["role", "purpose"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "dagger_gateway_tokens", "Tokens of successful requests to a policy.", ["role", "purpose", "kind"], registry=registry
        )
        self._labels = Counter("dagger_gateway_labels", "Labels by flaw; None can be trained on.", ["flaw"], registry=registry)
        self._hard_labels = Counter(
            "dagger_gateway_hard_labels",
            "Labels that can be trained on whose log-probabilities the teacher did not tell, although it was asked for them.",
            registry=registry,
        )
        self.labels_under_way = Gauge("dagger_gateway_labels_under_way", "Labels asked for and not there.", registry=registry)
        self.label_seconds = Histogram(
            "dagger_gateway_label_seconds", "From when a label's turn came to having it.", buckets=_SECONDS, registry=registry
        )
        for actor in Role:
            self.turns.labels(actor)
        for flaw in ("None", *LabelFlaw):
            self._labels.labels(flaw)

    def answered(self, role: Role, purpose: Purpose, completion: Completion) -> None:
        """Record a policy's answer."""
        self._seconds.labels(role, purpose).observe(completion.latency_seconds)
        kinds = {
            "uncached": completion.prompt_tokens - completion.cached_tokens,
            "cached": completion.cached_tokens,
            "completion": completion.completion_tokens,
        }
        for kind, tokens in kinds.items():
            self._tokens.labels(role, purpose, kind).inc(max(0, tokens))

    def labelled(self, flaw: LabelFlaw | None, *, hard: bool) -> None:
        """Count a label. `hard`: it lacks log-probabilities that were asked for."""
        self._labels.labels(flaw or "None").inc()
        if hard and flaw is None:
            self._hard_labels.inc()
