"""How failures are handled: which are retried, on which budget, and what is kept of a failed run."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule


class FailureAction(StrEnum):
    RETRY = "Retry"
    RETRY_WITHOUT_COUNTING = "RetryWithoutCounting"
    FAIL_RUN = "FailRun"


class RunStage(StrEnum):
    """A stage, as named in a failure rule."""

    PREPARE = "Prepare"
    PREFLIGHT = "Preflight"
    ROLLOUT = "Rollout"
    TRAINING = "Training"
    PUBLISH = "Publish"
    EVALUATION = "Evaluation"


class Keep(StrEnum):
    LOGS = "Logs"
    EVERYTHING = "Everything"
    NOTHING = "Nothing"


_CAUSE = "a rule needs reasons or exitCodes: write at least one of them"


class FailureRule(ApiModel):
    """What to do about a stage's pod that failed in a certain way."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("size(self.reasons) > 0 || size(self.exitCodes) > 0", _CAUSE),)

    stages: Annotated[list[RunStage], Field(max_length=6)] = []
    """Stages that the rule applies to; empty means all."""
    reasons: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=16)] = []
    """Reasons that match: a stage's own, such as `StorageUnavailable`, or a container's, such as `OOMKilled`."""
    exit_codes: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(max_length=32)] = []
    """Exit codes that match."""
    action: FailureAction
    """Retry: retry on the stage's own budget. RetryWithoutCounting: retry on the infrastructure budget. FailRun: fail the run at once."""

    @model_validator(mode="after")
    def _has_a_cause(self) -> Self:
        if not self.reasons and not self.exit_codes:
            raise Misfit("exitCodes", None, _CAUSE)
        return self


class FailurePolicy(ApiModel):
    """Retry budgets and rules. If no rule matches, exit code 3 fails the run, exit code 75 and disruptions count as infrastructure
    failures, and everything else counts as the stage's own failure."""

    infrastructure_retries: Annotated[int, Field(ge=0, le=1000)] = 20
    """Retries of each stage pod after infrastructure failures: disruptions, exit code 75, and what rules add. A server that restarts
    because storage or the hub is unavailable has the same budget."""
    rules: Annotated[list[FailureRule], Field(max_length=16)] = []
    """Rules in order; the first one that matches applies."""
    keep: Keep = Keep.LOGS
    """What to keep of a failed run. Logs: its ended Jobs, and its servers scaled to zero. Everything: also its running servers, with the
    GPUs they hold, until it is suspended. Nothing: only the object that failed; if the API server refused an object, the same as Logs."""
