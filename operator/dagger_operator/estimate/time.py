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
    groups = ranks / getattr(training, "sequence_parallel", 1)
    sequences = max(1.0, work.sequences / max(1.0, steps))
    # With fewer sequences than groups some have none; with a few more, some have one more than others.
    busy = sequences / groups / math.ceil(round(sequences / groups, 6))
    return training_flops(shape, work, training.activation_checkpointing) / (ranks * busy * gpu.flops * utilisation)


@dataclass(frozen=True)
class Acting:
    """Rollouts at work. All in flight move in step: in a cycle each takes one turn, so servers see the largest batches, and the time is
    rather too long than too short. Stragglers and retries are not in it."""

    talk: Conversation
    in_flight: int
    student: Pool | None
    """None is an endpoint."""
    teacher: Pool | None
    assumed: Assumptions

    def rollout_seconds(self, spec: RunSpec, rollouts: int, teacher_share: float) -> float:
        """A round's rollouts with their labels."""
        mode, at_once = spec.labels.mode, min(self.in_flight, rollouts)
        student_acts = at_once * (1 - teacher_share)
        deferred = mode is LabelMode.DEFERRED
        student = self._busy(self.student, student_acts, at_once)
        teacher = self._teacher_busy(spec, at_once * teacher_share if deferred else at_once, at_once)
        waits = 1.0 if mode is LabelMode.INLINE else teacher_share
        turn = waits * teacher + (1 - teacher_share) * student + self.assumed.command_seconds
        # Labels that nobody waits for still have to be written.
        cycle = max(turn, student, teacher)
        after = self._teacher_busy(spec, student_acts, at_once) if deferred else 0.0
        return rollouts / at_once * (self.talk.turns * (cycle + after) + self.assumed.rollout_seconds)

    def evaluation_seconds(self, tasks: int, most_turns: int | None) -> float:
        """The student alone on the held-out tasks."""
        at_once = min(self.in_flight, tasks)
        turns = min(self.talk.turns, most_turns or self.talk.turns)
        cycle = self._busy(self.student, at_once, at_once) + self.assumed.command_seconds
        return tasks / at_once * (turns * cycle + self.assumed.rollout_seconds)

    def _busy(self, pool: Pool | None, calls: float, at_once: int) -> float:
        """Seconds of a cycle in which a pool answers so many calls. A rollout's new tokens since its last call there are to be read, and
        what is no longer cached."""
        if calls <= 0:
            return 0.0
        if pool is None:
            return self.assumed.endpoint_seconds
        context = self.talk.mean_state
        lost = (1 - pool.cached(at_once, context)) * context
        new = min(context, self.talk.growth * at_once / calls) + lost
        return pool.call_seconds(calls / pool.serving.replicas, min(context, new), context)

    def _teacher_busy(self, spec: RunSpec, calls: float, at_once: int) -> float:
        """An endpoint answers as many calls at once as acting and `labels.concurrency` let through."""
        if self.teacher is not None or calls <= 0:
            return self._busy(self.teacher, calls, at_once)
        through = spec.rollouts.workers * spec.labels.concurrency
        return self.assumed.endpoint_seconds * max(1.0, calls / through)
