"""Labelled states as the student's tokens: one sample is a state's prompt followed by the teacher's turn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dagger_operator.api import Role
from dagger_operator.api.training import LabelWeights, Loss, Training
from dagger_operator.store.records import Trajectory, labelled_states
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.soft import Soft, soft
from dagger_operator.training.strand import Strand, Tokens, following
from dagger_operator.training.template import StudentTemplate

_ALIKE = LabelWeights()


@dataclass(frozen=True)
class Sample:
    """One labelled state. Only the label's tokens are targets."""

    trajectory: str
    """Round and rollout, for example `0001/00017`."""
    turn: int
    strand: Strand
    """The state as the server renders it, then the label including its end-of-turn token: prompt + label tokens."""
    prompt: int
    """Number of those tokens that are the state."""
    weight: float = 1.0
    """Weight of each target in the loss."""
    soft: Soft | None = None
    """The teacher's distribution at each target, if the loss uses it; with None only the tokens are learned."""
    shard: str = ""
    """Key of the file that the sample comes from."""

    @property
    def tokens(self) -> Tokens:
        """Shape (prompt + label,); assembled on each access."""
        return self.strand.tokens()

    @property
    def targets(self) -> Tokens:
        """Shape (label,): the tokens to learn."""
        return self.strand.tokens(self.prompt)


@dataclass(frozen=True)
class Tokenised:
    samples: tuple[Sample, ...]
    """Ordered by round, rollout and turn."""
    too_long: int
    """Labelled states left out because they exceed `maxSequenceTokens`."""
    untold: int = 0
    """Samples that should have soft targets but for which the teacher returned no log-probabilities."""
    foreign: int = 0
    """Samples for which it returned tokens other than the student's."""

    @property
    def hard_labels(self) -> int:
        return self.untold + self.foreign


def tokenise(
    trajectories: Iterable[Trajectory],
    template: StudentTemplate,
    max_tokens: int,
    weights: LabelWeights = _ALIKE,
    soft_below: int | None = None,
    shard: str = "",
) -> Tokenised:
    """Return as a sample every labelled state with a weight of these trajectories, which are from one shard. With `soft_below`, the
    teacher's log-probabilities are kept for token ids below it.

    Raises `StageFailure("TemplateMismatch")` if the student acted and the server counted a different number of prompt tokens: training
    would then see other states than the student does.
    """
    samples: list[Sample] = []
    too_long = untold = foreign = 0
    for trajectory in trajectories:
        name = f"{trajectory.round:04d}/{trajectory.rollout_id}"
        counted = {turn.index: turn.action.prompt_tokens for turn in trajectory.turns if turn.actor is Role.STUDENT}
        students = {turn.index for turn in trajectory.turns if turn.actor is Role.STUDENT}
        strand: Strand | None = None
        for state in labelled_states(trajectory):
            if not (weight := weights.student_acted if state.turn in students else weights.teacher_acted):
                continue
            prompt = template.prompt(state.messages, state.tools)
            served = counted.get(state.turn, 0)  # 0: the server did not report it
            if served and served != len(prompt):
                raise StageFailure(
                    "TemplateMismatch",
                    f"rollout {name}, turn {state.turn}: the server counted {served} prompt tokens, training renders {len(prompt)}: "
                    "serve the student with the chat template and tokenizer of its checkpoint (no --chat-template, no "
                    "--tokenizer), and set template variables by --default-chat-template-kwargs in student.serving.extraArgs only",
                )
            label = template.label(state.messages, state.tools, state.label)
            if len(prompt) + len(label) > max_tokens:
                too_long += 1
                continue
            told = None
            if soft_below is not None:
                told = soft(label, state.logprobs, soft_below) if state.logprobs is not None else None
                untold += state.logprobs is None
                foreign += state.logprobs is not None and told is None
            strand = following(np.array(prompt + label, dtype=np.int32), strand)
            samples.append(Sample(name, state.turn, strand, len(prompt), weight, told, shard))
    return Tokenised(tuple(samples), too_long, untold, foreign)


def joined(parts: Sequence[Tokenised], training: Training) -> Tokenised:
    """Combine the results of all ranks. Raises `StageFailure` if nothing in them can be learned as training is configured."""
    samples = sorted((sample for part in parts for sample in part.samples), key=lambda sample: (sample.trajectory, sample.turn))
    too_long, untold, foreign = (sum(getattr(part, name) for part in parts) for name in ("too_long", "untold", "foreign"))
    if not samples:
        raise StageFailure(
            "NoLabels",
            f"{too_long} labelled states exceed training.maxSequenceTokens ({training.max_sequence_tokens}), and training.labelWeights "
            "leaves out all others: raise them",
        )
    if training.loss is Loss.FORWARD_KL and untold + foreign == len(samples):
        raise StageFailure(
            "NoSoftTargets",
            f"training.loss is ForwardKL, and of {len(samples)} labels not one is a soft target: of {untold} the teacher told no "
            "log-probabilities (labels.topLogprobs was 0 when they were made, or its server tells none), "
            f"of {foreign} those of other tokens than the student's (it has another tokenizer, or its turns read otherwise in its "
            "chat template): write training.loss CrossEntropy, or labels.topLogprobs for the rounds to come",
        )
    return Tokenised(tuple(samples), too_long, untold, foreign)
