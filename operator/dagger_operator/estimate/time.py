"""How long a stage takes."""

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
    """Computing of all steps, shared by the ranks as far as a step has sequences for them."""
    ranks = training.nodes * training.processes_per_node
    groups = ranks / training.sequence_parallel
    sequences = max(1.0, work.sequences / max(1.0, steps))
    # With fewer sequences than groups some have none; with a few more, some have one more than others.
    busy = sequences / groups / math.ceil(round(sequences / groups, 6))
    return training_flops(shape, work, training.activation_checkpointing) / (ranks * busy * gpu.flops * utilisation)


@dataclass(frozen=True)
class Load:
    """What conversations that move in step ask of a policy."""

    in_flight: int = 0
    """Conversations; each wants its prefix kept."""
    calls: float = 0.0
    """In a cycle, in which each of them takes one turn."""

    def __add__(self, other: "Load") -> "Load":
        return Load(self.in_flight + other.in_flight, self.calls + other.calls)


NOTHING = Load()


@dataclass(frozen=True)
class Acting:
    """Rollouts at work. All in flight move in step: in a cycle each takes one turn, so servers see the largest batches, and the time is
    rather too long than too short. Stragglers and retries are not in it. `beside` is what others ask the student meanwhile."""

    talk: Conversation
    most: int
    """Rollouts that the workers of one stage have in flight."""
    student: Pool | None
    """None is an endpoint."""
    teacher: Pool | None
    assumed: Assumptions

    def rollout_load(self, rollouts: int, teacher_share: float) -> Load:
        """Of a round's rollouts on the student."""
        at_once = min(self.most, rollouts)
        return Load(at_once, at_once * (1 - teacher_share)) if teacher_share < 1 else NOTHING

    def evaluation_load(self, tasks: int) -> Load:
        """Of an evaluation on the student: workers of its own have as many in flight as those of rollouts."""
        at_once = min(self.most, tasks)
        return Load(at_once, at_once)

    def rollout_seconds(self, spec: RunSpec, rollouts: int, teacher_share: float, beside: Load = NOTHING) -> float:
        """A round's rollouts with their labels."""
        mode, at_once, asked = spec.labels.mode, min(self.most, rollouts), self.rollout_load(rollouts, teacher_share)
        deferred = mode is LabelMode.DEFERRED
        student = self._busy(self.student, asked + beside) if asked.calls else 0.0
        own = student * asked.calls / (asked + beside).calls if asked.calls else 0.0
        teacher = self._teacher_busy(spec, Load(at_once, at_once * teacher_share if deferred else at_once))
        waits = 1.0 if mode is LabelMode.INLINE else teacher_share
        turn = waits * teacher + (1 - teacher_share) * student + self.assumed.command_seconds
        # Servers have to be done with a turn before the next, and labels that nobody waits for have to be written too.
        cycle = max(turn, own, teacher)
        after = self._teacher_busy(spec, Load(at_once, asked.calls)) if deferred else 0.0
        return rollouts / at_once * (self.talk.turns * (cycle + after) + self.assumed.rollout_seconds)

    def evaluation_seconds(self, tasks: int, most_turns: int | None, beside: Load = NOTHING) -> float:
        """The student alone on the held-out tasks."""
        turns = min(self.talk.turns, most_turns or self.talk.turns)
        asked = self.evaluation_load(tasks)
        cycle = self._busy(self.student, asked + beside) + self.assumed.command_seconds
        return tasks / asked.in_flight * (turns * cycle + self.assumed.rollout_seconds)

    def _busy(self, pool: Pool | None, load: Load) -> float:
        """Seconds of a cycle in which a pool answers. A conversation's new tokens since its last call there are to be read, and what is
        no longer cached."""
        if load.calls <= 0:
            return 0.0
        if pool is None:
            return self.assumed.endpoint_seconds
        context = self.talk.mean_state
        lost = (1 - pool.cached(load.in_flight, context)) * context
        new = min(context, self.talk.growth * load.in_flight / load.calls) + lost
        return pool.call_seconds(load.calls / pool.serving.replicas, min(context, new), context)

    def _teacher_busy(self, spec: RunSpec, load: Load) -> float:
        """An endpoint answers as many calls at once as acting and `labels.concurrency` let through."""
        if self.teacher is not None or load.calls <= 0:
            return self._busy(self.teacher, load)
        through = spec.rollouts.workers * spec.labels.concurrency
        return self.assumed.endpoint_seconds * max(1.0, load.calls / through)


@dataclass(frozen=True)
class Pace:
    """Seconds of a stage by itself, and while another works beside it to its end."""

    alone: float
    beside: float


def side_by_side(one: Pace, other: Pace) -> tuple[float, float]:
    """Seconds of two stages that begin together and slow each other down until one of them is done."""
    if one.beside > other.beside:
        return side_by_side(other, one)[::-1]
    return one.beside, one.beside + other.alone * (1 - one.beside / other.beside)
