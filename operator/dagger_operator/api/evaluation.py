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
    """The student alone, greedy, graded by a hidden check."""

    mode: EvaluationMode = EvaluationMode.EVERY_ROUND
    """Which rounds' students are evaluated."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the reported intervals."""
    max_turns: Annotated[int, Field(ge=1, le=10000)] | None = None
    """Turn limit in evaluation; default the scaffold's."""
    overlap: Overlap = Overlap.NEXT_ROUND
    """NextRound: a round's student is evaluated while the next round's rollouts ask it too. None: before they start."""

    def at(self, round_number: int, rounds: int) -> bool:
        """Whether the student that a round made is evaluated."""
        if self.mode is EvaluationMode.LAST_ROUND:
            return round_number == rounds
        return self.mode is EvaluationMode.EVERY_ROUND
