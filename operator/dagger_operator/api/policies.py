"""The two policies, student and teacher, and where each is served."""

import json
from collections.abc import Sequence
from enum import StrEnum
from hashlib import sha256
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule, list_map, refuse_repeated
from dagger_operator.api.pods import EnvVar, ObjectName, PodSettings


class Role(StrEnum):
    """The two policies. A turn records by role who acted; pods and settings state by role which policy they are for."""

    STUDENT = "student"
    TEACHER = "teacher"


Name = Annotated[str, Field(min_length=1, max_length=253)]
SecretKey = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]


class SecretKeyRef(ApiModel):
    """A key of a Secret in the run's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: SecretKey = "token"
    """Key within the Secret."""


class MaxTokensParameter(StrEnum):
    MAX_TOKENS = "MaxTokens"
    MAX_COMPLETION_TOKENS = "MaxCompletionTokens"


class Sampling(ApiModel):
    """Sampling settings of a policy's turns in rollouts. Evaluation is always greedy."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Softmax temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Probability mass of nucleus sampling."""
    max_tokens: Annotated[int, Field(ge=1, le=131072)] = 4096
    """Maximum tokens of one turn. A label cut off at this limit is counted but never trained on."""

    def asked(self, parameter: MaxTokensParameter) -> dict[str, float]:
        """Return the parameters of a request with these settings; `parameter` is the endpoint's `maxTokensParameter`."""
        shape = {"temperature": self.temperature, "top_p": self.top_p}
        if parameter is MaxTokensParameter.MAX_TOKENS:
            return {**shape, "max_tokens": self.max_tokens}
        # Such models refuse temperature and top_p at any value other than 1, and some of them even at 1, which they use anyway. Other
        # servers need an explicit 1: a model's own generation config may set something else.
        return {**{name: value for name, value in shape.items() if value != 1}, "max_completion_tokens": self.max_tokens}


class Endpoint(ApiModel):
    """An OpenAI-compatible endpoint that exists outside the run."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)]
    """Base URL without `/chat/completions`, usually ending in `/v1`."""
    model: Name | None = None
    """Model name to request; defaults to the policy's `model`."""
    secret_ref: SecretKeyRef | None = None
    """API key, sent as a bearer token. It reaches only the gateway, never a sandbox, a log or a trajectory."""
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 300
    """Deadline of one request."""
    max_tokens_parameter: MaxTokensParameter = MaxTokensParameter.MAX_TOKENS
    """Request parameter that carries `sampling.maxTokens`. OpenAI's o-series and GPT-5 accept only `max_completion_tokens`, which includes
    their reasoning, and only 1 as temperature and top_p: with MaxCompletionTokens a `temperature` or `topP` of 1 is not sent."""

    def version(self, model: str) -> str:
        """Return the policy version of this endpoint; `model` is the policy's, used if the endpoint names none of its own."""
        asked = f"{self.url}\n{self.model or model}"
        return f"endpoint-{sha256(asked.encode()).hexdigest()[:12]}"


_NODES_HAVE_GPUS = "a replica over several nodes is served on GPUs: write gpus, those of each node, or nodes 1"


def server_argument(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of an argument of vLLM's, written as `name value` or `name=value`; the last one wins, as in vLLM."""
    words = [word for argument in arguments for word in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    return next((value for word, value in reversed(list(pairwise(words))) if word == name), None)


class Serving(ApiModel):
    """vLLM servers that the run owns: a Deployment, or a LeaderWorkerSet if `nodes` is above 1."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("self.nodes == 1 || self.gpus > 0", _NODES_HAVE_GPUS),)

    image: Annotated[str, Field(min_length=1, max_length=512)] = "docker.io/vllm/vllm-openai:v0.32.0"
    """Image with vLLM 0.18 or newer, the first version with `--shutdown-timeout`; not used on a single machine without containers."""
    replicas: Annotated[int, Field(ge=1, le=256)] = 1
    """Number of servers; a rollout stays on one of them, so that its prefix stays cached there."""
    gpus: Annotated[int, Field(ge=0, le=16)] = 1
    """GPUs on each node of a replica, used as tensor-parallel size; 0 serves on the CPU."""
    nodes: Annotated[int, Field(ge=1, le=16)] = 1
    """Nodes of each replica, used as pipeline-parallel size, with `gpus` GPUs on each; above 1 a replica is a LeaderWorkerSet group."""
    max_model_len: Annotated[int, Field(ge=128, le=1048576)] = 65536
    """Context length in tokens, prompt and turn together."""
    tool_call_parser: Annotated[str, Field(max_length=64)] | None = None
    """vLLM's parser for this model's tool calls, such as `hermes` (Qwen3) or `qwen3_coder`. Required by the ToolCall protocol."""
    extra_args: Annotated[list[Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = []
    """Additional arguments of vLLM's API server, passed unchanged. A student that thinks by default, such as Qwen3-8B, needs
    `["--default-chat-template-kwargs", '{"enable_thinking": false}']` if its teacher does not think; training reads it too."""
    env: Annotated[list[EnvVar], Field(max_length=64, json_schema_extra=list_map("name"))] = []
    """Additional environment variables of vLLM's container. For the containers beside it use `pod.env`."""
    startup_deadline_seconds: Annotated[int, Field(ge=10, le=86400)] = 1800
    """Seconds that a replica may take from being scheduled on a node to answering, before it counts as failed: pulling images, fetching
    weights, loading them."""
    pod: PodSettings = PodSettings()
    """Scheduling, resources and environment of the serving pods; on a single machine without a cluster only the environment is used."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse_repeated("env", [variable.name for variable in self.env])
        if self.nodes > 1 and self.gpus == 0:
            raise Misfit("nodes", self.nodes, _NODES_HAVE_GPUS)
        return self

    def argument(self, name: str) -> str | None:
        """Return the value of one of `extraArgs`; see `server_argument`."""
        return server_argument(self.extra_args, name)

    @property
    def hf_overrides(self) -> dict[str, Any]:
        """The server's overrides of the model's `config.json`; empty if vLLM will refuse what is written."""
        try:
            overrides = json.loads(self.argument("--hf-overrides") or "{}")
        except ValueError:
            return {}
        return overrides if isinstance(overrides, dict) else {}


_STUDENT_ON_ONE_NODE = "a student's weights are replaced in place, on one node: write nodes 1 and as many gpus as it needs"


class Student(ApiModel):
    """The policy that learns."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("!(has(self.serving) && has(self.endpoint))", "give the student either serving or endpoint, not both"),
        Rule("!has(self.serving) || self.serving.nodes == 1", _STUDENT_ON_ONE_NODE),
    )

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    """Initial weights: a Hugging Face id, a folder, or a URL below the run's storage."""
    sampling: Sampling = Sampling()
    """Sampling of the student's turns in rollouts."""
    serving: Serving | None = None
    """How the student is served; applies with its defaults if no `endpoint` is given."""
    endpoint: Endpoint | None = None
    """A fixed student that the run does not train; requires `training.mode: Disabled`. Rounds then only collect labels."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.serving is not None and self.endpoint is not None:
            raise Misfit("endpoint", self.endpoint.url, "give the student either serving or endpoint, not both")
        if self.serving is not None and self.serving.nodes > 1:
            raise Misfit("serving.nodes", self.serving.nodes, _STUDENT_ON_ONE_NODE)
        return self

    @property
    def served(self) -> Serving | None:
        """The serving settings with defaults applied; None if the student is an endpoint."""
        return None if self.endpoint else self.serving or Serving()


class Teacher(ApiModel):
    """The policy that labels; only its text is used, and with `labels.topLogprobs` its log-probabilities."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.serving) != has(self.endpoint)", "give the teacher exactly one of serving and endpoint"),
    )

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    """A Hugging Face id, a folder, a URL below the run's storage, or the name by which the endpoint knows the model."""
    sampling: Sampling = Sampling()
    """Sampling of the teacher's turns and labels."""
    serving: Serving | None = None
    """Serve the teacher with vLLM as part of the run."""
    endpoint: Endpoint | None = None
    """Use an existing OpenAI-compatible endpoint."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.serving is None) == (self.endpoint is None):
            found = "both" if self.serving else "neither"
            raise Misfit("endpoint", found, "give the teacher exactly one of serving and endpoint")
        return self
