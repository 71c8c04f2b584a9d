"""What failures mean: which are tried again, on which budget, and what is kept of a run that failed."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule


class FailureAction(StrEnum):
    RETRY = "Retry"
    RETRY_WITHOUT_COUNTING = "RetryWithoutCounting"
    FAIL_RUN = "FailRun"


class RunStage(StrEnum):
    """A stage, as a rule names it."""

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
    """What is done about a pod of a stage that failed in a certain way."""

    cel: ClassVar[tuple[Rule, ...]] = (Rule("size(self.reasons) > 0 || size(self.exitCodes) > 0", _CAUSE),)

    stages: Annotated[list[RunStage], Field(max_length=6)] = []
    """Stages that the rule is about; empty: all."""
    reasons: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=16)] = []
    """Reasons that match: a stage's own, such as `StorageUnavailable`, or a container's, such as `OOMKilled`."""
    exit_codes: Annotated[list[Annotated[int, Field(ge=1, le=255)]], Field(max_length=32)] = []
    """Exit codes that match."""
    action: FailureAction
    """Retry: on the stage's own budget. RetryWithoutCounting: on the budget for infrastructure. FailRun: at once."""

    @model_validator(mode="after")
    def _has_a_cause(self) -> Self:
        if not self.reasons and not self.exit_codes:
            raise Misfit("exitCodes", None, _CAUSE)
        return self


class FailurePolicy(ApiModel):
    """Budgets and rules. Without a rule: exit code 3 fails the run, exit code 75 and disruption count as infrastructure, all else as the
    stage's own fault."""

    infrastructure_retries: Annotated[int, Field(ge=0, le=1000)] = 20
    """Further tries of each pod of a stage that infrastructure ended: disruption, exit code 75, and what rules add. A server that starts
    again for want of storage or the hub has as many."""
    rules: Annotated[list[FailureRule], Field(max_length=16)] = []
    """The first rule that matches decides."""
    keep: Keep = Keep.LOGS
    """Of a run that failed. Logs: its ended Jobs, its servers at zero. Everything: its servers too, with the GPUs they hold, until
    it is suspended. Nothing: only the object that failed; where the API server refused one, as Logs."""
