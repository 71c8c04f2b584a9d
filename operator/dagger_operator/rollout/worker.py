"""A worker of a stage: what all its rollouts share, opened once, and the pool that works through them."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp
from prometheus_client import CollectorRegistry

from dagger_operator.api import Mixing, ScaffoldType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.upstream import upstreams
from dagger_operator.rollout.actions import ActionReader
from dagger_operator.rollout.attempt import Attempts
from dagger_operator.rollout.command_scaffold import CommandScaffold
from dagger_operator.rollout.metrics import WorkerMetrics
from dagger_operator.rollout.mini_scaffold import MiniScaffold
from dagger_operator.rollout.pool import Pool, Share
from dagger_operator.rollout.sandboxes import gateway_place, sandboxes
from dagger_operator.rollout.scaffold import ScaffoldProgram
from dagger_operator.rollout.served import Recovery, served
from dagger_operator.store.exposition import exposed
from dagger_operator.store.layout import Kind
from dagger_operator.store.stage import Stage
from dagger_operator.tasks.deal import Assignment


@dataclass(frozen=True)
class Job:
    """The rollouts of a stage and how they are run."""

    kind: Kind
    assignments: tuple[Assignment, ...]
    mixing: Mixing | None
    """None in evaluation: the student alone, greedy, no labels."""
    max_turns: int


async def work(stage: Stage, job: Job, reader: ActionReader) -> None:
    """Work until every rollout of the job is finished by some worker. Raises `StageFailure`, `StoreUnavailable`."""
    rollouts = stage.run.spec.rollouts
    share = Share(
        store=stage.store,
        round=stage.round,
        kind=job.kind,
        worker=stage.worker,
        index=stage.index,
        workers=rollouts.workers,
        assignments=job.assignments,
        concurrency=rollouts.concurrency,
        lease_seconds=rollouts.lease_seconds,
        retries=rollouts.infrastructure_retries,
    )
    with exposed(stage.environ) as registry:
        metrics = WorkerMetrics(registry, job.kind)
        async with _attempts(stage, job, reader, metrics, registry) as (attempts, recovered):
            await Pool(share, metrics, attempts, attempts.excluded, recovered).run()


@asynccontextmanager
async def _attempts(
    stage: Stage, job: Job, reader: ActionReader, metrics: WorkerMetrics, registry: CollectorRegistry
) -> AsyncIterator[tuple[Attempts, Recovery]]:
    """Yield what runs the tries, and what waits for the policies after a broken try."""
    spec = stage.run.spec
    student, teacher = await upstreams(stage, greedy=job.mixing is None)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        recovered = Recovery(http, served(stage.run, student, teacher))
        await recovered()
        provider = await stack.enter_async_context(sandboxes(stage))
        gateway = await stack.enter_async_context(Gateway(student, teacher, spec.labels, registry=registry, **gateway_place(stage)))
        attempts = Attempts(
            run=stage.run,
            round=stage.round,
            worker=stage.worker,
            mixing=job.mixing,
            max_turns=job.max_turns,
            student=student.version,
            teacher=teacher.version if teacher else "",
            provider=provider,
            gateway=gateway,
            program=_program(stage, http, stack),
            reader=reader,
            metrics=metrics,
        )
        yield attempts, recovered


def _program(stage: Stage, http: aiohttp.ClientSession, stack: AsyncExitStack) -> ScaffoldProgram:
    spec = stage.run.spec
    if spec.scaffold.type is ScaffoldType.COMMAND:
        return CommandScaffold(tuple(spec.scaffold.command or ()), timeout=spec.rollouts.timeout_seconds)
    executor = stack.enter_context(ThreadPoolExecutor(spec.rollouts.concurrency, thread_name_prefix="scaffold"))
    return MiniScaffold.of(spec.scaffold, http, executor, spec.sandbox.command_timeout_seconds)
