"""Teacher labels: the teacher's turn at a visited state, requested at lower priority than actions."""

import asyncio
import time

import structlog

from dagger_operator.api import Role
from dagger_operator.policy.client import Client
from dagger_operator.policy.failures import PolicyFailure, PolicyRefused
from dagger_operator.policy.metrics import GatewayMetrics, Purpose
from dagger_operator.policy.recorder import Label
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.session import LabelCheck
from dagger_operator.policy.upstream import Upstream
from dagger_operator.store.records import Completion, LabelFlaw

ACTING_PRIORITY = 0
LABEL_PRIORITY = 10
"""vLLM serves lower numbers first."""


def judged(teacher: Upstream, completion: Completion, check: LabelCheck) -> Label:
    """Return a teacher's turn as a label: one that is cut off, or that the scaffold cannot parse, is kept but must not train."""
    if teacher.cut_off(completion):
        return Label(completion, LabelFlaw.TRUNCATED)
    return Label(completion, LabelFlaw.UNPARSABLE if check(completion.message) is not None else None)


class Labeller:
    """Requests labels, at most `concurrency` at once in one worker."""

    def __init__(self, teacher: Client, concurrency: int, metrics: GatewayMetrics) -> None:
        self._teacher, self._metrics = teacher, metrics
        self._slots = asyncio.Semaphore(concurrency)

    async def label(self, request: ChatRequest, *, seed: int, affinity: str, check: LabelCheck) -> tuple[Label, float]:
        """Return the label at this state, and the seconds it took once it had a slot. A request that fails for good yields a flaw."""
        with self._metrics.labels_under_way.track_inprogress():
            return await self._asked(request, seed, affinity, check)

    async def _asked(self, request: ChatRequest, seed: int, affinity: str, check: LabelCheck) -> tuple[Label, float]:
        async with self._slots:
            started = time.monotonic()
            try:
                answer = await self._teacher.complete(request, seed=seed, priority=LABEL_PRIORITY, affinity=affinity)
                self._metrics.answered(Role.TEACHER, Purpose.LABEL, answer.completion)
                label = judged(self._teacher.upstream, answer.completion, check)
            except PolicyFailure as failure:
                structlog.get_logger().warning("label failed", rollout=affinity, reason=failure.reason, message=failure.message)
                label = Label(None, LabelFlaw.REFUSED if isinstance(failure, PolicyRefused) else LabelFlaw.REQUEST_FAILED)
            seconds = time.monotonic() - started
        self._metrics.label_seconds.observe(seconds)
        return label, seconds
