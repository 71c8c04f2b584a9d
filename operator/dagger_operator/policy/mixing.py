"""Who acts in a turn: a pure function of the mixing spec and the turn's key."""

from dataclasses import dataclass

from dagger_operator.api import Mixing, MixingStrategy, Role
from dagger_operator.policy.coins import coin, kappa


@dataclass(frozen=True)
class Decision:
    """Who acts, and why: the teacher if `coin < beta`."""

    actor: Role
    beta: float
    coin: float


@dataclass(frozen=True)
class Mixer:
    """Decides who acts in each turn of one rollout."""

    mixing: Mixing | None
    """None in evaluation: the student alone."""
    seed: int
    round: int
    task: str
    rollout: str

    @property
    def kappa(self) -> int | None:
        """StudentPrefix: the number of turns that the student takes before the teacher finishes."""
        if self.mixing is None or self.mixing.strategy is not MixingStrategy.STUDENT_PREFIX:
            return None
        return kappa(self.seed, self.round, self.task, self.rollout, self.mixing.max_prefix_at(self.round))

    def decide(self, turn: int) -> Decision:
        """Return the decision for a turn, counted from 0."""
        draw = coin(self.seed, self.round, self.task, self.rollout, turn)
        beta = self._beta(turn)
        return Decision(Role.TEACHER if draw < beta else Role.STUDENT, beta, draw)

    def _beta(self, turn: int) -> float:
        if self.mixing is None:
            return 0.0
        prefix = self.kappa
        if prefix is None:
            return self.mixing.beta_at(self.round)
        return 1.0 if turn >= prefix else 0.0
