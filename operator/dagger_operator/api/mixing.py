"""Who acts in a turn: mixing strategies and their schedules over rounds (paper, section 3; AggreVaTe-style variant)."""

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from dagger_operator.api.model import ApiModel, Misfit, Rule


class ScheduleType(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    EXPONENTIAL = "Exponential"
    LIST = "List"


_NEEDS: dict[ScheduleType, tuple[str, ...]] = {
    ScheduleType.CONSTANT: ("value",),
    ScheduleType.LINEAR: ("start", "step"),
    ScheduleType.EXPONENTIAL: ("start", "factor"),
    ScheduleType.LIST: ("values",),
}


class Schedule(ApiModel):
    """A number for each round i = 1, 2, ...

    Constant: `value`. Linear: `start + step * (i - 1)`. Exponential: `start * factor ** (i - 1)`. Linear and Exponential stop at `limit` if
    it is given. List: `values[i - 1]`; the last one repeats.
    """

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("self.type != 'Constant' || has(self.value)", "a Constant schedule needs value"),
        Rule("self.type != 'Linear' || (has(self.start) && has(self.step))", "a Linear schedule needs start and step"),
        Rule(
            "self.type != 'Exponential' || (has(self.start) && has(self.factor))",
            "an Exponential schedule needs start and factor",
        ),
        Rule("self.type != 'List' || has(self.values)", "a List schedule needs values, one for each round"),
    )

    type: ScheduleType
    """How the number changes over the rounds."""
    value: float | None = None
    """Constant: the number of every round."""
    start: float | None = None
    """Linear and Exponential: the number of round 1."""
    step: float | None = None
    """Linear: what each round adds; negative to anneal."""
    factor: Annotated[float, Field(gt=0)] | None = None
    """Exponential: what each round multiplies by."""
    limit: float | None = None
    """Linear and Exponential: a floor where the schedule falls, a ceiling where it rises."""
    values: Annotated[list[float], Field(min_length=1, max_length=1000)] | None = None
    """List: the number of each round; the last one repeats."""

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        for name in _NEEDS[self.type]:
            if getattr(self, name) is None:
                raise Misfit(name, None, f"a {self.type} schedule needs {' and '.join(_NEEDS[self.type])}")
        return self

    def numbers(self) -> dict[str, float]:
        """Return the numbers that determine each round's number, by field."""
        given = {"value": self.value, "start": self.start, "limit": self.limit}
        given |= {f"values[{index}]": number for index, number in enumerate(self.values or [])}
        return {name: number for name, number in given.items() if number is not None}

    def refuse_outside(self, field: str, low: float, high: float, remedy: str) -> None:
        """Raise `Misfit` for a number outside low..high; `schedule_rule` expresses the same in CEL."""
        for name, number in self.numbers().items():
            if not low <= number <= high:
                raise Misfit(f"{field}.{name}", number, remedy)

    def at(self, round_number: int) -> float:
        """Return the number of a round; rounds count from 1."""
        if round_number < 1:
            raise ValueError(f"rounds count from 1, got {round_number}")
        n = round_number - 1
        match self.type:
            case ScheduleType.CONSTANT:
                return self.value or 0.0
            case ScheduleType.LIST:
                values = self.values or [0.0]
                return values[min(n, len(values) - 1)]
            case ScheduleType.LINEAR:
                # Rounded so that 1.0 - 0.2 * 2 is 0.6 in reports, and in comparisons with a list.
                number, falling = round((self.start or 0.0) + (self.step or 0.0) * n, 12), (self.step or 0.0) < 0
            case ScheduleType.EXPONENTIAL:
                number, falling = (self.start or 0.0) * (self.factor or 1.0) ** n, (self.factor or 1.0) < 1
        if self.limit is None:
            return number
        return max(self.limit, number) if falling else min(self.limit, number)


def schedule_rule(field: str, low: float, high: float, message: str) -> Rule:
    """Return the rule that every number given in a model's schedule lies in low..high."""
    path = f"self.{field}"
    inside = f"{{0}} >= {float(low)} && {{0}} <= {float(high)}"
    parts = [f"(!has({path}.{name}) || ({inside.format(f'{path}.{name}')}))" for name in ("value", "start", "limit")]
    parts.append(f"(!has({path}.values) || {path}.values.all(v, {inside.format('v')}))")
    return Rule(f"!has({path}) || ({' && '.join(parts)})", message)


class MixingStrategy(StrEnum):
    PER_TURN = "PerTurn"
    STUDENT_PREFIX = "StudentPrefix"


def _paper_beta() -> Schedule:
    return Schedule(type=ScheduleType.LINEAR, start=1.0, step=-0.2, limit=0.6)


MOST_TURNS = 10_000
_BETA = "beta is a probability: write a number in 0..1"
_PREFIX = f"T_max is a number of turns: write one in 0..{MOST_TURNS}"


class Mixing(ApiModel):
    """PerTurn: the teacher acts in a turn with probability beta. StudentPrefix: the student takes the first kappa turns,
    kappa ~ U{0..maxPrefixTurns}, and the teacher finishes (AggreVaTe-style)."""

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.strategy != 'StudentPrefix' || has(self.maxPrefixTurns)",
            "the StudentPrefix strategy needs maxPrefixTurns, the T_max schedule",
        ),
        schedule_rule("beta", 0, 1, _BETA),
        schedule_rule("maxPrefixTurns", 0, MOST_TURNS, _PREFIX),
    )

    strategy: MixingStrategy = MixingStrategy.PER_TURN
    """PerTurn decides at random in every turn who acts. StudentPrefix draws once per rollout how many turns the student takes first."""
    beta: Schedule = Field(default_factory=_paper_beta)
    """PerTurn: the probability, by round, that the teacher acts. Default: the paper's max(0.6, 1.0 - 0.2 (i - 1)). A Linear or Exponential
    schedule is clamped to 0..1."""
    max_prefix_turns: Schedule | None = None
    """StudentPrefix: T_max by round, the maximum number of turns that the student takes first."""

    @model_validator(mode="after")
    def _is_a_probability(self) -> Self:
        if self.strategy is MixingStrategy.STUDENT_PREFIX and self.max_prefix_turns is None:
            raise Misfit("maxPrefixTurns", None, "the StudentPrefix strategy needs maxPrefixTurns, the T_max schedule")
        self.beta.refuse_outside("beta", 0, 1, _BETA)
        if self.max_prefix_turns is not None:
            self.max_prefix_turns.refuse_outside("maxPrefixTurns", 0, MOST_TURNS, _PREFIX)
        return self

    def beta_at(self, round_number: int) -> float:
        """Return the nominal probability that the teacher acts in a turn of this round."""
        return min(1.0, max(0.0, self.beta.at(round_number)))

    def max_prefix_at(self, round_number: int) -> int:
        """Return T_max of this round, in turns."""
        return max(0, int(self.max_prefix_turns.at(round_number))) if self.max_prefix_turns else 0
