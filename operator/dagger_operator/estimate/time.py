"""Duration of stages."""

import math
from dataclasses import dataclass

from dagger_operator.api import RunSpec, Training
from dagger_operator.api.rollouts import LabelMode
from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.flops import training as training_flops
from dagger_operator.estimate.hardware import Gpu
from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.workload import Conversation, Tokens


def training_seconds(shape: Shape, training: Training, gpu: Gpu, utilisation: float, work: Tokens, steps: float) -> float:
    """Return the time to compute all steps, divided among the ranks as far as a step has sequences for them."""
    ranks = training.nodes * training.processes_per_node
    groups = ranks / training.sequence_parallel
    sequences = max(1.0, work.sequences / max(1.0, steps))
    # With fewer sequences than groups some groups idle; with a few more, some have one more than others.
    busy = sequences / groups / math.ceil(round(sequences / groups, 6))
    return training_flops(shape, work, training.activation_checkpointing) / (ranks * busy * gpu.flops * utilisation)


@dataclass(frozen=True)
class Load:
    """Load on a policy by conversations that advance in lockstep."""

    in_flight: int = 0
    """Number of conversations; each needs its prefix kept."""
    calls: float = 0.0
    """Calls per cycle, in which each conversation takes one turn."""

    def __add__(self, other: "Load") -> "Load":
        return Load(self.in_flight + other.in_flight, self.calls + other.calls)


NOTHING = Load()


@dataclass(frozen=True)
class Acting:
    """Rollouts in progress. All in flight advance in lockstep: in a cycle each takes one turn, so servers see the largest batches, and the
    time is over- rather than underestimated. Stragglers and retries are ignored. `beside` is other concurrent load on the student."""

    talk: Conversation
    most: int
    """Rollouts that the workers of one stage have in flight."""
    student: Pool | None
    """None for an endpoint."""
    teacher: Pool | None
    assumed: Assumptions

    def rollout_load(self, rollouts: int, teacher_share: float) -> Load:
        """Return the load of a round's rollouts on the student."""
        at_once = min(self.most, rollouts)
        return Load(at_once, at_once * (1 - teacher_share)) if teacher_share < 1 else NOTHING

    def evaluation_load(self, tasks: int) -> Load:
        """Return the load of an evaluation on the student: its own workers have as many in flight as those of rollouts."""
        at_once = min(self.most, tasks)
        return Load(at_once, at_once)

    def rollout_seconds(self, spec: RunSpec, rollouts: int, teacher_share: float, beside: Load = NOTHING) -> float:
        """Return the time of a round's rollouts with their labels."""
        mode, at_once, asked = spec.labels.mode, min(self.most, rollouts), self.rollout_load(rollouts, teacher_share)
        deferred = mode is LabelMode.DEFERRED
        student = self._busy(self.student, asked + beside) if asked.calls else 0.0
        own = student * asked.calls / (asked + beside).calls if asked.calls else 0.0
        teacher = self._teacher_busy(spec, Load(at_once, at_once * teacher_share if deferred else at_once))
        waits = 1.0 if mode is LabelMode.INLINE else teacher_share
        turn = waits * teacher + (1 - teacher_share) * student + self.assumed.command_seconds
        # Servers must finish a turn before the next, and labels that nobody waits for must be generated too.
        cycle = max(turn, own, teacher)
        after = self._teacher_busy(spec, Load(at_once, asked.calls)) if deferred else 0.0
        return rollouts / at_once * (self.talk.turns * (cycle + after) + self.assumed.rollout_seconds)

    def evaluation_seconds(self, tasks: int, most_turns: int | None, beside: Load = NOTHING) -> float:
        """Return the time of evaluating the student alone on the held-out tasks."""
        turns = min(self.talk.turns, most_turns or self.talk.turns)
        asked = self.evaluation_load(tasks)
        cycle = self._busy(self.student, asked + beside) + self.assumed.command_seconds
        return tasks / asked.in_flight * (turns * cycle + self.assumed.rollout_seconds)

    def _busy(self, pool: Pool | None, load: Load) -> float:
        """Return the seconds per cycle in which a pool is busy. It reads a conversation's new tokens since its last call there, and
        what is no longer cached."""
        if load.calls <= 0:
            return 0.0
        if pool is None:
            return self.assumed.endpoint_seconds
        context = self.talk.mean_state
        lost = (1 - pool.cached(load.in_flight, context)) * context
        new = min(context, self.talk.growth * load.in_flight / load.calls) + lost
        return pool.call_seconds(load.calls / pool.serving.replicas, min(context, new), context)

    def _teacher_busy(self, spec: RunSpec, load: Load) -> float:
        """Return the same for the teacher. An endpoint answers as many calls at once as acting and `labels.concurrency` allow."""
        if self.teacher is not None or load.calls <= 0:
            return self._busy(self.teacher, load)
        through = spec.rollouts.workers * spec.labels.concurrency
        return self.assumed.endpoint_seconds * max(1.0, load.calls / through)


@dataclass(frozen=True)
class Pace:
    """Seconds of a stage by itself, and with another one running beside it until its end."""

    alone: float
    beside: float


def side_by_side(one: Pace, other: Pace) -> tuple[float, float]:
    """Return the seconds of two stages that start together and slow each other down until one of them is done."""
    if one.beside > other.beside:
        return side_by_side(other, one)[::-1]
    return one.beside, one.beside + other.alone * (1 - one.beside / other.beside)
