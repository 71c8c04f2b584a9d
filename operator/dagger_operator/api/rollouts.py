"""How tasks are worked on: scaffold, sandbox, labels, workers."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule
from dagger_operator.api.pods import ObjectName, PodSettings, SandboxPod


class ScaffoldType(StrEnum):
    MINI_SWE_AGENT = "MiniSWEAgent"
    COMMAND = "Command"


class Protocol(StrEnum):
    TEXT = "Text"
    TOOL_CALL = "ToolCall"


class Scaffold(ApiModel):
    """The agent program."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("self.type != 'Command' || has(self.command)", "a Command scaffold needs command"),)

    type: ScaffoldType = ScaffoldType.MINI_SWE_AGENT
    """MiniSWEAgent runs outside the sandbox. Command runs inside it and calls OPENAI_BASE_URL with OPENAI_API_KEY."""
    protocol: Protocol = Protocol.TEXT
    """How the agent states a command: in a fenced block of text, or as a tool call. Determines which labels count as parsable."""
    command: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(min_length=1, max_length=64)] | None = None
    """Command: argument vector to run in the sandbox; the task's statement is in $DAGGER_TASK_STATEMENT."""
    max_turns: Annotated[int, Field(ge=1, le=10000)] = 100
    """Turns after which a rollout ends as LimitReached."""
    system_template: Annotated[str, Field(max_length=16384)] | None = None
    """MiniSWEAgent: jinja2 template of the system message; defaults to the library's own."""
    instance_template: Annotated[str, Field(max_length=16384)] | None = None
    """MiniSWEAgent: jinja2 template of the first user message, with `task` for the statement."""
    observation_template: Annotated[str, Field(max_length=16384)] | None = None
    """MiniSWEAgent: jinja2 template of an observation, with `output.output` and `output.returncode`."""
    format_error_template: Annotated[str, Field(max_length=16384)] | None = None
    """MiniSWEAgent: jinja2 template of the message to an agent whose turn contains no parsable command, with `error`."""
    action_regex: Annotated[str, Field(max_length=1024)] | None = None
    """Text protocol: regular expression whose first group is the command; defaults to the library's fenced block."""
    submit_command: Annotated[str, Field(max_length=1024)] = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
    """MiniSWEAgent: the command with which the agent declares its work done."""

    @model_validator(mode="after")
    def _command_given(self) -> Self:
        if self.type is ScaffoldType.COMMAND and self.command is None:
            raise Misfit("command", None, "a Command scaffold needs command, the argument vector to run")
        return self


class SandboxBackend(StrEnum):
    POD = "Pod"
    PROCESS = "Process"


class SandboxLimits(ApiModel):
    """Limits of one sandbox; whatever exceeds them is stopped, and the agent is informed. If that ends the whole pod, its rollout ends
    too."""

    cpus: Annotated[float, Field(gt=0, le=256)] = 1.0
    """Processor cores."""
    memory_mib: Annotated[int, Field(ge=16, le=1048576)] = 4096
    """Memory in MiB."""
    disk_mib: Annotated[int, Field(ge=1, le=1048576)] = 10240
    """Writable disk in MiB, and the maximum size of a single file. A pod that exceeds it is evicted, and its rollout ends as
    LimitReached."""
    processes: Annotated[int, Field(ge=4, le=32768)] = 512
    """Maximum processes and threads at once."""
    output_kib: Annotated[int, Field(ge=1, le=65536)] = 256
    """Output kept of one command in KiB; the middle of longer output is cut out at its source."""


_POD_IS_CONFINED = (
    "allowUnconfined is for sandboxes that are processes, and a pod is always confined: leave it out, or write backend Process"
)


class Sandbox(ApiModel):
    """Where untrusted commands run: no credentials, no network, limits on everything."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.allowUnconfined) || !self.allowUnconfined || !has(self.backend) || self.backend != 'Pod'", _POD_IS_CONFINED),
    )

    backend: SandboxBackend | None = None
    """Pod on a cluster, Process on a single machine; defaults to what the runtime offers."""
    allow_unconfined: bool = False
    """Process: if bubblewrap is missing or not permitted, run commands anyway, as plain processes that can reach the network and this
    user's files and processes, including credentials. Only for tasks and models that you trust. If false, the stage fails instead."""
    namespace: ObjectName | None = None
    """Namespace of sandbox pods, separate from GPUs and Secrets; defaults to the operator's setting. With the chart it can be no other:
    only there does the operator have the necessary rights and clean up what workers left."""
    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Image of sandboxes for tasks that name none."""
    helper_image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Image with the helper that runs commands in a sandbox pod; defaults to the operator's setting."""
    create_timeout_seconds: Annotated[int, Field(ge=1, le=7200)] = 600
    """Deadline for a sandbox to become ready, including the image pull. Missing it is an infrastructure failure."""
    command_timeout_seconds: Annotated[int, Field(ge=1, le=7200)] = 60
    """Deadline of one command. Exceeding it is reported to the agent as an observation."""
    grade_timeout_seconds: Annotated[int, Field(ge=1, le=14400)] = 1800
    """Deadline of the grading script."""
    limits: SandboxLimits = SandboxLimits()
    """Limits of each sandbox."""
    pod: SandboxPod = SandboxPod()
    """Scheduling and identity of sandbox pods."""

    @model_validator(mode="after")
    def _confined_in_pods(self) -> Self:
        if self.allow_unconfined and self.backend is SandboxBackend.POD:
            raise Misfit("allowUnconfined", True, _POD_IS_CONFINED)
        return self


class LabelMode(StrEnum):
    INLINE = "Inline"
    ASYNC = "Async"
    DEFERRED = "Deferred"


class Labels(ApiModel):
    """The teacher's turn at every visited state, whoever acted."""

    mode: LabelMode = LabelMode.ASYNC
    """Inline: before the action is returned. Async: while the rollout continues. Deferred: when it has ended, all at once."""
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Minimum share of visited states with a label that can be trained on; below it the round fails."""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 64
    """Maximum concurrent label requests in one worker."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 6
    """Maximum attempts of one request to a policy, with exponential back-off that respects Retry-After."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Number of most likely tokens whose log-probabilities the teacher is asked for at each token of a label, as `training.loss` ForwardKL
    needs them. A vLLM server returns them at no further cost than their size; many other endpoints return none. A label without them is
    trained on as a hard target."""


class Rollouts(ApiModel):
    """The workers of a round."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of worker pods or processes."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    """Maximum concurrent rollouts in one worker."""
    timeout_seconds: Annotated[int, Field(ge=1, le=604800)] = 14400
    """Deadline of one rollout, after which it ends as LimitReached."""
    lease_seconds: Annotated[int, Field(ge=2, le=3600)] = 60
    """Seconds that a silent worker keeps a rollout before another one may take it."""
    infrastructure_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """Retries of a rollout that failed because of infrastructure; after them it is excluded and counted."""
    min_valid_fraction: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Minimum share of a round's rollouts that no infrastructure failure excluded; below it the round fails and says why."""
    pod: PodSettings = PodSettings()
    """Scheduling, resources and environment of the pods of every stage but training; on a single machine without a cluster only the
    environment is used."""
