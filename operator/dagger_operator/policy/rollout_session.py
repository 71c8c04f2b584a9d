"""An open rollout: its turns run one after the other, each decided by its coin, answered by a policy, recorded and labelled."""

import asyncio
import time
from collections.abc import Callable
from functools import partial

from dagger_operator.api import LabelMode, Role
from dagger_operator.policy.act import Act, TurnDropped
from dagger_operator.policy.client import Answer, Client
from dagger_operator.policy.coins import request_seed
from dagger_operator.policy.failures import CONTEXT_TOO_LONG, PolicyFailure, PolicyRefused, PolicyUnavailable
from dagger_operator.policy.labels import ACTING_PRIORITY, Labeller, judged
from dagger_operator.policy.metrics import GatewayMetrics, Purpose
from dagger_operator.policy.mixing import Mixer
from dagger_operator.policy.recorder import Label, Recorder
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.session import Recording, SessionRequest, Silence
from dagger_operator.policy.streaming import Chunk
from dagger_operator.store.records import Failure


class TurnLimit(Exception):
    """The rollout has had all its turns."""


class RolloutSession:
    """Implements `session.Session`."""

    def __init__(
        self,
        request: SessionRequest,
        *,
        base_url: str,
        token: str,
        student: Client,
        teacher: Client | None,
        labeller: Labeller | None,
        metrics: GatewayMetrics,
        on_close: Callable[[], None],
    ) -> None:
        """`teacher` and `labeller` are None in evaluation."""
        self.base_url, self.token = base_url, token
        self.admission = asyncio.Lock()
        """Held while a request is read and given its turn: one request at a time."""
        self._request, self._student, self._teacher, self._labeller = request, student, teacher, labeller
        self._metrics, self._on_close = metrics, on_close
        self._mixer = Mixer(request.mixing, request.seed, request.round, request.task_id, request.rollout_id)
        self._recorder = Recorder()
        self._act: Act | None = None
        self._labels: dict[int, asyncio.Task[None]] = {}
        self._deferred: dict[int, ChatRequest] = {}
        self._failed: Exception | None = None
        self._too_long: Failure | None = None
        """Set if the last request's state was too long: an agent may shorten its context and continue."""
        self._closed = False
        self._limit_reached = False
        self._acting_seconds = self._label_seconds = 0.0
        self._asked: Role | None = None
        """The policy that is being asked for a turn right now."""
        self._heard_at = 0.0
        self._silence: Silence | None = None

    def check(self) -> None:
        """Raise what `turn` would raise for any request, so that such requests need not be read.

        After the first request beyond the last turn no further one is read: whoever sends it has already received that turn.
        """
        if self._closed:
            raise TurnDropped
        if self._failed is not None:
            raise self._failed.anew() if isinstance(self._failed, PolicyFailure) else self._failed
        if self._limit_reached:
            raise TurnLimit(f"this rollout has had its {self._request.max_turns} turns")

    async def turn(self, request: ChatRequest) -> Act:
        """Return the turn at this state. A request equal to the last one gets the same turn: the scaffold lost the answer and asks again.

        Raises `TurnLimit`, `TurnDropped` if the rollout has ended, and `PolicyFailure` if a policy failed it for good before.
        """
        while True:
            self.check()
            act = self._act
            if act is not None and act.request == request:
                return act
            if act is None or act.done:
                break
            await act.settled()
        if len(self._recorder.turns) >= self._request.max_turns:
            self._limit_reached = True
            self.check()
        request, self._too_long = self._recorder.interned(request), None
        self._act = Act(request, self._run)
        return self._act

    async def _run(self, act: Act) -> Answer:
        index = len(self._recorder.turns)
        decision = self._mixer.decide(index)
        client = self._student if decision.actor is Role.STUDENT else self._teacher
        assert client is not None, "a mix without a teacher is refused when the session is opened"
        mode = self._request.labels
        labelled = decision.actor is Role.STUDENT and self._labeller is not None
        if labelled and mode is not LabelMode.DEFERRED:
            self._labels[index] = asyncio.create_task(self._label(index, act.request))
        started = self._heard_at = time.monotonic()
        self._asked = decision.actor
        try:
            answer = await client.complete(
                act.request,
                seed=self._seed(index, decision.actor),
                priority=ACTING_PRIORITY,
                affinity=self._request.rollout_id,
                forward=partial(self._forward, act) if act.request.stream else None,
                failing=act.failing,
            )
        except BaseException as error:
            if isinstance(error, PolicyRefused) and error.reason == CONTEXT_TOO_LONG:
                self._too_long = error.record
            else:
                # If dropped while the request was being retried, the policy failed, whatever the scaffold made of it.
                why = error if isinstance(error, Exception) else act.trouble
                self._failed = why.anew() if isinstance(why, PolicyFailure) else why
                self._act = None  # nobody will get this turn, and the rollout may continue for hours: do not keep its request
            if (label := self._labels.pop(index, None)) is not None:
                label.cancel()
            raise
        finally:
            self._asked = None
            self._acting_seconds += time.monotonic() - started
        self._recorder.record(act.request, decision, answer.completion)
        self._metrics.turns.labels(decision.actor).inc()
        self._metrics.answered(decision.actor, Purpose.ACTION, answer.completion)
        if decision.actor is Role.TEACHER:
            self._set_label(index, judged(client.upstream, answer.completion, self._request.label_check))
        elif labelled and mode is LabelMode.DEFERRED:
            self._deferred[index] = act.request
        elif labelled and mode is LabelMode.INLINE:
            await asyncio.shield(self._labels[index])
        return answer

    def _forward(self, act: Act, chunk: Chunk) -> None:
        self._heard_at = time.monotonic()
        act.forward(chunk)

    async def _label(self, index: int, request: ChatRequest) -> None:
        assert self._labeller is not None
        label, seconds = await self._labeller.label(
            request,
            seed=self._seed(index, Role.TEACHER),
            affinity=self._request.rollout_id,
            check=self._request.label_check,
        )
        self._label_seconds += seconds
        self._set_label(index, label)

    def _set_label(self, index: int, label: Label) -> None:
        self._recorder.labels[index] = label
        asked = self._teacher is not None and self._teacher.upstream.top_logprobs > 0
        self._metrics.labelled(label.flaw, hard=asked and (label.completion is None or label.completion.logprobs is None))

    def _seed(self, turn: int, role: Role) -> int:
        key = self._request
        return request_seed(key.seed, key.round, key.task_id, key.rollout_id, turn, role.value)

    async def finish(self) -> Recording:
        """Close, wait for outstanding labels, and return the record. A turn in progress is dropped, as nobody will execute it; if its
        request to the policy was already being retried, the policy failed the rollout."""
        await self._close()
        if self._failed is not None and not isinstance(self._failed, PolicyFailure):
            await self._drop_labels()
            raise self._failed
        if isinstance(self._failed, PolicyUnavailable):
            await self._drop_labels()  # nothing of this rollout will be trained on
        else:
            for index, request in self._deferred.items():
                self._labels[index] = asyncio.create_task(self._label(index, request))
            try:
                await asyncio.gather(*self._labels.values())
            except BaseException:
                await self._drop_labels()
                raise
        return Recording(
            turns=self._recorder.labelled(),
            kappa=self._mixer.kappa,
            failure=self._failed.record if isinstance(self._failed, PolicyUnavailable) else None,
            policy_error=self._failed.record if isinstance(self._failed, PolicyRefused) else self._too_long,
            limit_reached=self._limit_reached,
            acting_seconds=self._acting_seconds,
            label_seconds=self._label_seconds,
            silence=self._silence,
        )

    async def abort(self) -> None:
        """Close the session and cancel its upstream requests."""
        await self._close()
        await self._drop_labels()

    async def _close(self) -> None:
        self._closed = True
        self._on_close()
        if self._asked is not None:
            self._silence = Silence(self._asked, time.monotonic() - self._heard_at)
        if self._act is not None and not self._act.done:
            await self._act.drop()

    async def _drop_labels(self) -> None:
        for task in self._labels.values():
            task.cancel()
        await asyncio.gather(*self._labels.values(), return_exceptions=True)
