"""The operator's Prometheus metrics, documented in `docs/metrics.md`."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
import structlog
from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from dagger_operator import __version__
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.gpus import USES, held
from dagger_operator.cluster.readings import Readings
from dagger_operator.control import COMPONENT, StageName
from dagger_operator.control.said import time as time_of
from dagger_operator.control.said import true
from dagger_operator.store.exposition import fresh_registry

log = structlog.get_logger()

_QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGE = (10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 48 * 3600.0)
_GPU_SECONDS = 5.0
"""Seconds between two counts of held GPUs."""


class Metrics:
    def __init__(self) -> None:
        own = self.registry = fresh_registry()
        ProcessCollector(registry=own)
        PlatformCollector(registry=own)
        Gauge("dagger_operator_build_info", "Which operator this is.", ["version"], registry=own).labels(__version__).set(1)
        self._reconcile = Histogram("dagger_operator_reconcile_seconds", "One look at one run.", ["outcome"], buckets=_QUICK, registry=own)
        for outcome in ("Done", "Failed"):
            self._reconcile.labels(outcome)
        self._stages = Histogram(
            "dagger_stage_seconds", "From a stage's Job to its end.", ["stage", "outcome"], buckets=_STAGE, registry=own
        )
        self._gpu_seconds = Counter("dagger_gpu_seconds", "GPUs times the time they were held.", ["use"], registry=own)
        for use in USES:
            self._gpu_seconds.labels(use)
        self._events = Counter("dagger_operator_watch_events", "What the watches brought.", ["kind"], registry=own)
        self._requests = Counter("rest_client_requests", "Requests to the API server.", ["method", "code"], registry=own)
        self._answers = Histogram("rest_client_request_duration_seconds", "Until it answered.", ["verb"], buckets=_QUICK, registry=own)
        self.adds = Counter("workqueue_adds", "How often a look was asked for.", ["name"], registry=own).labels("runs")
        self.retries = Counter("workqueue_retries", "Looks that failed.", ["name"], registry=own).labels("runs")
        waited = Histogram("workqueue_queue_duration_seconds", "From due to started.", ["name"], buckets=_QUICK, registry=own)
        self.waited = waited.labels("runs")

    def read(self, readings: Readings) -> None:
        """Register metrics that are read at scrape time."""
        self.registry.register(readings)

    def timed(self, work: Callable[[RunKey], Awaitable[float | None]]) -> Callable[[RunKey], Awaitable[float | None]]:
        async def measured(key: RunKey) -> float | None:
            began, outcome = time.perf_counter(), "Failed"
            try:
                again = await work(key)
                outcome = "Done"
                return again
            finally:
                self._reconcile.labels(outcome).observe(time.perf_counter() - began)

        return measured

    def heard(self, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
        """Handle every watch event; a Job that was seen before and has ended now is a finished stage."""
        self._events.labels(now["kind"]).inc()
        if now["kind"] != "Job" or before is None or _end(before) is not None or (end := _end(now)) is None:
            return
        stage = (now["metadata"].get("labels") or {}).get(COMPONENT)
        began, ended = time_of(now["metadata"].get("creationTimestamp")), time_of(end.get("lastTransitionTime"))
        if stage in list(StageName) and began is not None and ended is not None:
            outcome = "Succeeded" if end["type"] == "Complete" else "Failed"
            self._stages.labels(stage, outcome).observe((ended - began).total_seconds())

    async def count_gpus(self, cache: Cache) -> None:
        """Add up GPU-seconds forever."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_GPU_SECONDS)
            now = time.monotonic()
            try:
                for use, gpus in held(cache.of_kind("Pod")).items():
                    self._gpu_seconds.labels(use).inc(gpus * (now - last))
            except Exception as error:  # whatever a pod states, runs go on: this task's end would be the operator's
                log.warning("GPUs not counted", error=repr(error))
            last = now

    def trace(self) -> aiohttp.TraceConfig:
        """Return a trace that counts the requests of an HTTP session."""
        trace = aiohttp.TraceConfig()

        async def begun(_: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceRequestStartParams) -> None:
            context.began = time.perf_counter()

        async def answered(_: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestEndParams) -> None:
            self._requests.labels(params.method, str(params.response.status)).inc()
            if "watch" not in params.url.query:
                self._answers.labels(params.method).observe(time.perf_counter() - context.began)

        async def failed(_: aiohttp.ClientSession, __: SimpleNamespace, params: aiohttp.TraceRequestExceptionParams) -> None:
            self._requests.labels(params.method, "<error>").inc()

        trace.on_request_start.append(begun)
        trace.on_request_end.append(answered)
        trace.on_request_exception.append(failed)
        return trace

    def routes(self) -> list[web.RouteDef]:
        async def exposition(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

        return [web.get("/metrics", exposition)]


def _end(job: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return true(job, "Complete", "Failed")
