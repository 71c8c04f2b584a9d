"""The operator's assembly: leader election, watches, workers."""

import asyncio
import contextlib
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, cast

import structlog
from aiohttp import web

from dagger_operator.api import API_VERSION, KIND
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.health import Health
from dagger_operator.cluster.leader import Leader
from dagger_operator.cluster.metrics import Metrics
from dagger_operator.cluster.places import Places
from dagger_operator.cluster.queue import WorkQueue
from dagger_operator.cluster.readings import Readings
from dagger_operator.cluster.reaper import Reaper
from dagger_operator.cluster.reconcile import Reconciler
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.watches import Watches

log = structlog.get_logger()

SPACING = 1.0
"""Minimum seconds between two reconciles of one run."""
CRD_PATIENCE = 60.0
"""Seconds to wait for a CRD that does not exist yet."""


class NoCrd(Exception):
    """The cluster does not know DAggerRuns."""


async def operate(settings: Settings) -> None:
    """Run until the process is told to stop, then return, or raise `CancelledError` if that is before the watches are opened.

    Raises `NoCluster`, `NoCrd`, `NewKind`, `LeadershipLost`, or whatever prevents it from continuing; a restart may help.
    """
    _stop_on_signals()
    metrics = Metrics()
    async with Client.connect([metrics.trace()]) as client, contextlib.AsyncExitStack() as stack:
        leader = None
        if settings.lease != "-":
            identity = f"{settings.pod}_{uuid.uuid4().hex[:8]}"
            leader = Leader(client, lambda: Client.connect([metrics.trace()]), settings.namespace, settings.lease, identity)
        working = client.fenced(leader.fence) if leader else client

        cache, queue = Cache(), WorkQueue[RunKey](time.monotonic, spacing=SPACING)
        queue.on_add, queue.on_retry, queue.on_take = metrics.adds.inc, metrics.retries.inc, metrics.waited.observe
        reconciler = Reconciler(settings, cache, working)
        stack.push_async_callback(reconciler.close)
        watches = Watches(settings, cache, working, wake=queue.add, gone=reconciler.applier.forget, heard=metrics.heard)
        health = Health(
            watches.streams,
            standstill=lambda: queue.standstill,
            look=lambda: queue.longest,
            leads=lambda: leader is None or leader.holds,
        )
        metrics.read(Readings(cache, queue, health))
        await stack.enter_async_context(_serving(settings.health_port, health.routes()))
        await stack.enter_async_context(_serving(settings.metrics_port, metrics.routes()))

        await _require_crd(client)
        try:
            if leader is not None:
                await leader.acquire()
            tasks: list[Coroutine[Any, Any, None]] = [
                health.watch_the_loop(),
                metrics.count_gpus(cache),
                _work(queue, watches, metrics.timed(reconciler.reconcile), Places(settings.workers)),
                *([leader.keep()] if leader else []),
                *([Reaper(settings.sandbox_namespace, cache, working, queue.add).run()] if settings.sandbox_namespace else []),
                watches.run([metrics.trace()]),
                watches.outgrow(),
            ]
            await _first(tasks)
        finally:
            if leader is not None:
                await leader.release()


def _stop_on_signals() -> None:
    """Cancel the calling task on SIGTERM and SIGINT. kopf replaces these handlers by its own once it opens the watches."""
    stop = cast("asyncio.Task[None]", asyncio.current_task()).cancel
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


async def _work(queue: WorkQueue[RunKey], watches: Watches, look: Callable[[RunKey], Awaitable[float | None]], places: Places) -> None:
    await watches.fill()
    await queue.run(look, places)


async def _first(tasks: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run tasks until the first one ends, cancel the others, and raise what it raised."""
    running = [asyncio.create_task(one) for one in tasks]
    try:
        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    for one in done:
        one.result()


async def _require_crd(client: Client) -> None:
    deadline = time.monotonic() + CRD_PATIENCE
    while KIND not in await client.served(API_VERSION):  # an API server that does not answer ends this process; the kubelet restarts it
        problem = f"the cluster has no {KIND} in {API_VERSION}: apply manifests/crd/daggerruns.yaml, or install the chart with crds.install"
        if time.monotonic() > deadline:
            raise NoCrd(problem)
        log.warning("waiting for the CRD", problem=problem)
        await asyncio.sleep(5)


@contextlib.asynccontextmanager
async def _serving(port: int, routes: Iterable[web.RouteDef]) -> AsyncIterator[None]:
    """Serve the routes on a port; 0 means none."""
    if not port:
        yield
        return
    application = web.Application()
    application.add_routes(routes)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        # On every address, IPv4 and IPv6: the kubelet and Prometheus connect from outside the pod.
        await web.TCPSite(runner, None, port).start()
        yield
    finally:
        await runner.cleanup()
