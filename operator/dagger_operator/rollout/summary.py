"""What a round's rollouts delivered, counted one trajectory at a time. Pure."""

from collections import Counter

from dagger_operator.api import Role, RolloutSummary
from dagger_operator.rollout.actions import ActionReader
from dagger_operator.store.records import LabelFlaw, Outcome, Trajectory, Turn

_OUT_OF_TOKENS = ("length", "tool_calls")
"""Finish reasons of labels that ran out of tokens; vLLM reports `tool_calls` for some of them, too. Any other is the endpoint's own."""


class Tally:
    """Counts of finished rollouts. Those that infrastructure broke are counted as such and in no other way."""

    def __init__(self, reader: ActionReader) -> None:
        self._reader = reader
        self.outcomes: Counter[Outcome] = Counter()
        self.excluded: Counter[str] = Counter()
        """Rollouts that infrastructure broke, by reason."""
        self.flaws: Counter[LabelFlaw] = Counter()
        """Visited states without a label to train on, by flaw; those in `stopped` are left out."""
        self.stopped: Counter[str] = Counter()
        """Visited states whose label was cut off although tokens were left, by its `finish_reason`, such as `content_filter`."""
        self.mendable: list[str] = []
        """Rollouts without a turn or with a flawed label that editing the run might fix."""
        self.turns = self.labels = 0
        self._teacher_turns = self._teacher_tokens = self._tokens = 0
        self._compared = self._agreed = 0
        self._started, self._ended = float("inf"), 0.0

    def add(self, trajectory: Trajectory) -> None:
        self.outcomes[trajectory.outcome] += 1
        timings = trajectory.timings
        self._started = min(self._started, timings.started_at)
        self._ended = max(self._ended, timings.started_at + timings.total)
        if trajectory.outcome is Outcome.INFRASTRUCTURE_FAILURE:
            self.excluded[trajectory.failure.reason if trajectory.failure else "Unknown"] += 1
            return
        if not trajectory.turns or any(map(_mendable, trajectory.turns)):
            self.mendable.append(trajectory.rollout_id)
        for turn in trajectory.turns:
            self.turns += 1
            self._tokens += turn.action.completion_tokens
            if turn.actor is Role.TEACHER:
                self._teacher_turns += 1
                self._teacher_tokens += turn.action.completion_tokens
            if reason := _stopped(turn):
                self.stopped[reason] += 1
                continue
            if turn.label is None or turn.label_flaw is not None:
                self.flaws[turn.label_flaw or LabelFlaw.REQUEST_FAILED] += 1
                continue
            self.labels += 1
            if turn.actor is Role.STUDENT:
                self._compared += 1
                self._agreed += self._reader.agree(turn.action.message, turn.label.message)

    @property
    def rollouts(self) -> int:
        return self.outcomes.total()

    @property
    def valid_fraction(self) -> float:
        """Share of rollouts that infrastructure did not break."""
        return 1 - self.outcomes[Outcome.INFRASTRUCTURE_FAILURE] / self.rollouts if self.rollouts else 1.0

    @property
    def coverage(self) -> float:
        """Share of visited states with a label to train on."""
        return self.labels / self.turns if self.turns else 0.0

    @property
    def seconds(self) -> float:
        """From the first rollout's start to the last one's end, by the workers' clocks."""
        return max(0.0, self._ended - self._started) if self.rollouts else 0.0

    def summary(self, *, nominal_beta: float | None, data_digest: str) -> RolloutSummary:
        return RolloutSummary(
            rollouts=self.rollouts,
            outcomes={outcome.value: count for outcome, count in sorted(self.outcomes.items())},
            turns=self.turns,
            labels=self.labels,
            label_coverage=self.coverage,
            nominal_beta=nominal_beta,
            teacher_turn_share=self._teacher_turns / self.turns if self.turns else 0.0,
            teacher_token_share=self._teacher_tokens / self._tokens if self._tokens else 0.0,
            agreement=self._agreed / self._compared if self._compared else None,
            data_digest=data_digest,
            seconds=self.seconds,
        )


def _stopped(turn: Turn) -> str | None:
    """Return the finish reason with which the endpoint cut off a turn's label although tokens were left, or None if it did not."""
    if turn.label is None or turn.label_flaw is not LabelFlaw.TRUNCATED or turn.label.finish_reason in _OUT_OF_TOKENS:
        return None
    return turn.label.finish_reason


def _mendable(turn: Turn) -> bool:
    """Whether editing the run may give a state with a flawed label one to train on."""
    return turn.label_flaw not in (None, LabelFlaw.UNPARSABLE) and _stopped(turn) is None
