"""The agent's own metrics (docs/metrics.md); on `/metrics` they are followed by vLLM's."""

from prometheus_client import Counter, Gauge, Histogram, generate_latest

from dagger_operator.serving.gate import Gate
from dagger_operator.store.exposition import fresh_registry


class AgentMetrics:
    def __init__(self, gate: Gate) -> None:
        self._registry = fresh_registry()
        self._requests = Counter("dagger_agent_requests", "Requests for a turn, by status code.", ["code"], registry=self._registry)
        self._swaps = Histogram(
            "dagger_agent_swap_seconds",
            "How long nobody was served while weights changed, by how they changed.",
            ["how"],
            buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
            registry=self._registry,
        )
        self._policy = Gauge("dagger_agent_policy_info", "1 for the version that was verified last.", ["version"], registry=self._registry)
        self._requests.labels(200)  # a counter that first appears at 1 shows no increase
        for how in ("InPlace", "Restart"):
            self._swaps.labels(how)
        inside = Gauge("dagger_agent_requests_in_flight", "Requests for a turn under way.", registry=self._registry)
        inside.set_function(lambda: gate.inside)

    def answered(self, code: int) -> None:
        self._requests.labels(code).inc()

    def swapped(self, how: str, seconds: float) -> None:
        """`how`: InPlace or Restart (`seconds` then ends at the request to restart)."""
        self._swaps.labels(how).observe(seconds)

    def serves(self, version: str) -> None:
        self._policy.clear()
        self._policy.labels(version).set(1)

    def exposition(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
