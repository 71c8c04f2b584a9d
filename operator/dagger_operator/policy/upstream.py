"""How the gateway reaches the two policies: address, model name and sampling."""

from dataclasses import dataclass, field, replace
from typing import Any

from dagger_operator.api import MaxTokensParameter, Role, Sampling, Student, Teacher
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.retry import Backoff
from dagger_operator.store import logprobs
from dagger_operator.store.records import Completion
from dagger_operator.store.results import PreflightResult, read_result
from dagger_operator.store.stage import Stage, StageFailure

SERVED_TIMEOUT_SECONDS = 900.0
"""Deadline of one request to a served policy: a label has lower priority than actions, so it may queue for long."""


@dataclass(frozen=True)
class Upstream:
    """One policy."""

    role: Role
    urls: tuple[str, ...]
    """Base URLs, up to but without `/chat/completions`: one per replica, or one whose host name stands for several addresses."""
    token: str | None = field(repr=False)
    """Bearer token; it is sent to the policy and nowhere else."""
    model: str
    """Model name in requests; a served policy's is its version."""
    version: str
    """Policy version that every completion is recorded under."""
    sampling: Sampling
    timeout_seconds: float
    """Deadline of one try, including the whole answer."""
    attempts: int
    """Tries of one request, including the first."""
    served: bool
    """Whether this is vLLM behind the policy agent rather than an external endpoint: it honours `seed` and `priority`, and its answers
    must name the requested version."""
    backoff: Backoff = field(default_factory=Backoff)
    max_tokens_parameter: MaxTokensParameter = MaxTokensParameter.MAX_TOKENS
    context: int = 0
    """Tokens of prompt and turn together that a served policy accepts; 0 if not known."""
    top_logprobs: int = 0
    """Log-probabilities requested for each token; only of a teacher, whose labels keep them."""

    def greedy(self) -> "Upstream":
        """Return the same policy, decoding greedily."""
        return replace(self, sampling=self.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0}))

    def cut_off(self, completion: Completion) -> bool:
        """Whether a turn of this policy was cut off rather than ending by itself.

        `tool_calls` is ambiguous: vLLM reports it for every turn in which its parser found a call, and some parsers find one in a turn
        that was cut off. Then the token counts decide.
        """
        if completion.finish_reason != "tool_calls":
            return completion.finish_reason != "stop"
        used = completion.prompt_tokens + completion.completion_tokens
        return completion.completion_tokens >= self.sampling.max_tokens or 0 < self.context <= used

    def body(self, request: ChatRequest, *, stream: bool, seed: int, priority: int) -> dict[str, Any]:
        """Return the request for this policy: the scaffold's state with the spec's sampling."""
        body: dict[str, Any] = {"model": self.model, "messages": list(request.messages), **request.options}
        if request.tools:
            body["tools"] = list(request.tools)
        body |= self.sampling.asked(self.max_tokens_parameter)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.served:
            body |= {"seed": seed, "priority": priority}
        return body | logprobs.asked(self.top_logprobs)


async def upstreams(stage: Stage, *, greedy: bool) -> tuple[Upstream, Upstream | None]:
    """Return student and teacher of a stage, from its environment. `greedy` is evaluation: the student alone.

    A served teacher's version is the one that preflight found. Raises `StageFailure` if something is missing, `StoreUnavailable`.
    """
    spec = stage.run.spec
    student = _upstream(stage, Role.STUDENT, spec.student, _required(stage, "DAGGER_POLICY"))
    if greedy:
        return student.greedy(), None
    return student, _upstream(stage, Role.TEACHER, spec.teacher, "" if spec.teacher.endpoint else await _teacher_version(stage))


async def _teacher_version(stage: Stage) -> str:
    found = await read_result(stage.store, 0, PreflightResult)
    if found is None:
        raise StageFailure(
            "NoPreflight", "the served teacher's version is in the result of preflight, which must come first", permanent=False
        )
    return found.teacher


def _upstream(stage: Stage, role: Role, policy: Student | Teacher, version: str) -> Upstream:
    endpoint = policy.endpoint
    serving = policy.served if isinstance(policy, Student) else policy.serving
    name = role.value.upper()
    urls = tuple(url.strip().rstrip("/") for url in _required(stage, f"DAGGER_{name}_URL").split(",") if url.strip())
    return Upstream(
        role=role,
        urls=urls,
        token=stage.token(role),
        model=endpoint.model or policy.model if endpoint else version,
        version=endpoint.version(policy.model) if endpoint else version,
        sampling=policy.sampling,
        timeout_seconds=endpoint.timeout_seconds if endpoint else SERVED_TIMEOUT_SECONDS,
        attempts=stage.run.spec.labels.attempts,
        served=endpoint is None,
        max_tokens_parameter=endpoint.max_tokens_parameter if endpoint else MaxTokensParameter.MAX_TOKENS,
        context=serving.max_model_len if serving else 0,
        top_logprobs=stage.run.spec.labels.top_logprobs if role is Role.TEACHER else 0,
    )


def _required(stage: Stage, name: str) -> str:
    value = stage.environ.get(name, "").strip()
    if not value:
        raise StageFailure("IncompleteEnvironment", f"{name} is not set: stages are started by `daggerctl run` or the operator")
    return value
