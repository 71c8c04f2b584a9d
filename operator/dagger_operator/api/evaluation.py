"""Greedy rollouts of one policy on the held-out tasks."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from dagger_operator.api.model import ApiModel


class EvaluationMode(StrEnum):
    EVERY_ROUND = "EveryRound"
    LAST_ROUND = "LastRound"
    DISABLED = "Disabled"


class Overlap(StrEnum):
    NEXT_ROUND = "NextRound"
    NONE = "None"


class Evaluation(ApiModel):
    """The student alone, decoded greedily, graded by a hidden check."""

    mode: EvaluationMode = EvaluationMode.EVERY_ROUND
    """Which rounds' students are evaluated."""
    initial: bool = False
    """Also evaluate the run's initial student, as round 0: the baseline for trained students. It does not depend on `mode`; with
    `training.mode: Disabled` it is the only evaluation."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence level of the reported intervals."""
    max_turns: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Turn limit in evaluation; defaults to the scaffold's."""
    overlap: Overlap = Overlap.NEXT_ROUND
    """NextRound: a round's student is evaluated while the next round's rollouts also query it. None: it is evaluated before they start."""

    def at(self, round_number: int, rounds: int) -> bool:
        """Whether the student produced by a round is evaluated; round 0's is the initial student."""
        if round_number == 0:
            return self.initial
        if self.mode is EvaluationMode.LAST_ROUND:
            return round_number == rounds
        return self.mode is EvaluationMode.EVERY_ROUND
