"""The operator as a process, and readings of its own metrics."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from scale_cluster import samples

METRICS, HEALTH = 18080, 18081

Buckets = Mapping[float, float]
"""Cumulative observations by upper bound."""


@dataclass(frozen=True)
class Reading:
    """Counters since the process started."""

    at: float
    cpu: float
    """Seconds, user and system."""
    reconciles: Buckets
    waits: Buckets
    """From due to started."""
    reads: float
    """Read requests to the API server, without watches."""
    writes: float
    """Write requests, without Lease renewals."""
    phases: Mapping[str, float]

    def since(self, before: "Reading") -> "Reading":
        def less(now: Buckets, then: Buckets) -> Buckets:
            return {bound: count - then.get(bound, 0.0) for bound, count in now.items()}

        return Reading(
            self.at - before.at,
            self.cpu - before.cpu,
            less(self.reconciles, before.reconciles),
            less(self.waits, before.waits),
            self.reads - before.reads,
            self.writes - before.writes,
            self.phases,
        )

    @property
    def looks(self) -> float:
        """Number of reconciles."""
        return max(self.reconciles.values(), default=0.0)


def quantile(buckets: Buckets, share: float) -> float:
    """Estimate a quantile as Prometheus does: linear within a bucket."""
    wanted, below, least = share * max(buckets.values(), default=0.0), 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= wanted:
            if bound == float("inf"):
                return least
            return least + (bound - least) * ((wanted - below) / (count - below) if count > below else 1.0)
        below, least = count, bound
    return least


class Operator:
    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._kubeconfig, self._log = kubeconfig, log
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        settings = {
            "KUBECONFIG": str(self._kubeconfig),
            "DAGGER_OPERATOR_METRICS_PORT": str(METRICS),
            "DAGGER_OPERATOR_HEALTH_PORT": str(HEALTH),
            "DAGGER_OPERATOR_SANDBOX_NAMESPACE": "default",
            "DAGGER_OPERATOR_LEASE": "scale",
        }
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "dagger_operator.cluster"]
            self._process = psutil.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def ready(self) -> bool:
        try:
            return self._ask(HEALTH, "readyz") == "ok"
        except OSError:
            return False

    @property
    def memory(self) -> float:
        """Peak resident memory so far, MiB."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def read(self) -> Reading:
        assert self._process is not None
        try:
            used, exposition = self._process.cpu_times(), self._ask(METRICS, "metrics")
        except (OSError, psutil.Error) as error:
            raise RuntimeError(f"the operator does not answer, or has ended: {self._log.read_text()[-2000:]}") from error

        def buckets(name: str) -> Buckets:
            tally: dict[float, float] = {}
            for (bound,), count in samples(exposition, f"{name}_bucket", "le"):
                tally[float(bound)] = tally.get(float(bound), 0.0) + count
            return tally

        requests = list(samples(exposition, "rest_client_requests_total", "method"))
        return Reading(
            time.monotonic(),
            used.user + used.system,
            buckets("dagger_operator_reconcile_seconds"),
            buckets("workqueue_queue_duration_seconds"),
            sum(count for (method,), count in requests if method == "GET"),
            sum(count for (method,), count in requests if method in ("POST", "PATCH", "DELETE")),
            {phase: count for (phase,), count in samples(exposition, "dagger_runs", "phase")},
        )

    def _ask(self, port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as answer:
            return str(answer.read().decode())
