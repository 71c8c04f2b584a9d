"""The estimate of a whole run: each round, all rounds, and what does not fit."""

import math
from collections.abc import Iterator

from dagger_operator.api import Aggregation, BatchUnit, GpuSharing, Overlap, PodSettings, RunSpec, Serving, TrainingMode
from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.fit import findings
from dagger_operator.estimate.hardware import Gpu
from dagger_operator.estimate.host import Need, ServingPod, is_folder, serving_pod, training_node
from dagger_operator.estimate.memory import Setup, training_memory
from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.result import Estimate, RoundEstimate
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.time import Acting, training_seconds
from dagger_operator.estimate.workload import Conversation, Tokens, teacher_share


def estimate(spec: RunSpec, gpu: Gpu, student: Shape, teacher: Shape | None, assumed: Assumptions) -> Estimate:
    """Everything about a run; `teacher` is None for an endpoint."""
    return _Planner(spec, gpu, student, teacher, assumed).estimate()


class _Planner:
    def __init__(self, spec: RunSpec, gpu: Gpu, student: Shape, teacher: Shape | None, assumed: Assumptions) -> None:
        self.spec, self.gpu, self.shape, self.assumed = spec, gpu, student, assumed
        self.talk = Conversation(assumed.turns, assumed.first_tokens, assumed.turn_growth, assumed.turn_tokens)
        self.student, self.teacher = self._pool(spec.student.served, student), self._pool(spec.teacher.serving, teacher)
        self.trains = spec.training.mode is TrainingMode.ENABLED
        self.shares = [teacher_share(spec.mixing, number, assumed.turns) for number in range(1, spec.rounds + 1)]
        self.labels_of_a_step = spec.training.batch_size if spec.training.batch_unit is BatchUnit.LABELS else None
        most = spec.training.micro_batch_tokens
        self.trees = {share: self.talk.trees(share, most, self.labels_of_a_step) for share in set(self.shares)}
        self.per_label = self.talk.per_label()
        in_flight = spec.rollouts.workers * spec.rollouts.concurrency
        self.acting = Acting(self.talk, in_flight, self.student, self.teacher, assumed)

    def estimate(self) -> Estimate:
        rounds = tuple(self._round(number) for number in range(1, self.spec.rounds + 1))
        on_gpus = self.trains and self.spec.training.gpus_per_node > 0
        memory = training_memory(self.shape, Setup.of(self.spec.training)) if on_gpus else None
        node = training_node(self.shape, self.spec.training, memory, self._label_tokens()) if memory is not None else None
        student, teacher = self._pod(self.student, 2), self._pod(self.teacher, 0 if is_folder(self.spec.teacher.model) else 1)
        needs: list[tuple[str, PodSettings, Need]] = [("training.pod", self.spec.training.pod, node)] if node is not None else []
        for role, pool, pod in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if pool is not None and pod is not None:
                needs.append((f"{role}.serving.pod", pool.serving.pod, pod))
        training = self.spec.training.nodes * self.spec.training.gpus_per_node if on_gpus else 0
        serving = sum(pool.gpus for pool in (self.student, self.teacher) if pool is not None)
        shared = self.spec.gpu_sharing is GpuSharing.TIME_SHARED
        hours, gpu_hours = self._hours(rounds, serving, training, shared)
        return Estimate(
            assumed=self.assumed,
            gpu=self.gpu,
            rounds=rounds,
            training=memory,
            training_node=node,
            student_pod=student,
            teacher_pod=teacher,
            student=self.student,
            teacher=self.teacher,
            gpus=max(serving, training) if shared else serving + training,
            hours=hours,
            gpu_hours=gpu_hours,
            findings=findings(self.spec, self.gpu, self.shape, memory, self.student, self.teacher, needs, self.talk),
        )

    def _pool(self, serving: Serving | None, shape: Shape | None) -> Pool | None:
        return Pool(serving, shape, self.gpu, self.assumed) if serving is not None and serving.gpus and shape is not None else None

    def _pod(self, pool: Pool | None, versions: int) -> ServingPod | None:
        return serving_pod(pool.shape, pool.serving, versions) if pool is not None else None

    def _round(self, number: int) -> RoundEstimate:
        share = self.shares[number - 1]
        rollouts = self._rollouts(number)
        turns = rollouts * self.talk.turns
        steps, trees, per_label = self._training(number)
        as_trees = str(getattr(self.spec.training, "packing", "Trees")) == "Trees"
        return RoundEstimate(
            round=number,
            teacher_share=share,
            rollouts=rollouts,
            labels=turns,
            student_calls=turns * (1 - share),
            teacher_prompt_tokens=rollouts * self.talk.prompts,
            teacher_output_tokens=turns * self.talk.label,
            steps=steps,
            trees=trees,
            per_label=per_label,
            rollout_seconds=self._rollout_seconds(rollouts, share),
            training_seconds=self._training_seconds(trees if as_trees else per_label, steps),
            training_seconds_per_label=self._training_seconds(per_label, steps),
            evaluation_seconds=self._evaluation_seconds(number),
        )

    def _rollouts(self, number: int) -> int:
        return self.spec.tasks.count_at(number) * self.spec.tasks.rollouts_per_task

    def _training(self, number: int) -> tuple[int, Tokens, Tokens]:
        """Optimiser steps of a round, and what passes through the model in all of them: the trajectories of its aggregation, as often
        as epochs or `steps` say."""
        training = self.spec.training
        if not self.trains:
            return 0, Tokens(), Tokens()
        trees, trajectories = Tokens(), 0
        for earlier in self._aggregated(number):
            trees += self.trees[self.shares[earlier - 1]] * self._rollouts(earlier)
            trajectories += self._rollouts(earlier)
        units = trajectories * (self.talk.turns if self.labels_of_a_step else 1)
        steps = math.ceil(training.epochs * units / training.batch_size)
        times: float = training.epochs
        if training.steps is not None:
            steps = max(1, round(training.steps.at(number)))
            times = steps * training.batch_size / units
        return steps, trees * times, self.per_label * (trajectories * times)

    def _aggregated(self, number: int) -> range:
        """Rounds whose trajectories a round trains on."""
        return range(number if self.spec.training.aggregation is Aggregation.CURRENT_ROUND_ONLY else 1, number + 1)

    def _label_tokens(self) -> float:
        """Of all labels of the largest round: each trajectory's last state, and the labels."""
        rounds = range(1, self.spec.rounds + 1)
        held = self.talk.trees(teacher_share=0.0, most_tokens=math.inf).tokens
        return held * max(sum(map(self._rollouts, self._aggregated(number))) for number in rounds)

    def _training_seconds(self, work: Tokens, steps: int) -> float | None:
        if not self.trains:
            return 0.0
        if self.spec.training.gpus_per_node == 0:
            return None
        took = training_seconds(self.shape, self.spec.training, self.gpu, self.assumed.utilisation, work, steps)
        return took + self.assumed.change_seconds

    def _rollout_seconds(self, rollouts: int, share: float) -> float | None:
        unknown = (share < 1 and self._on_cpu(self.spec.student.served)) or self._on_cpu(self.spec.teacher.serving)
        return None if unknown else self.acting.rollout_seconds(self.spec, rollouts, share)

    def _evaluation_seconds(self, number: int) -> float | None:
        evaluation = self.spec.evaluation
        if not self.trains or not evaluation.at(number, self.spec.rounds):
            return 0.0
        if self._on_cpu(self.spec.student.served):
            return None
        return self.acting.evaluation_seconds(self.assumed.held_out, evaluation.max_turns)

    def _on_cpu(self, serving: Serving | None) -> bool:
        return serving is not None and serving.gpus == 0

    def _hours(self, rounds: tuple[RoundEstimate, ...], serving: int, training: int, shared: bool) -> tuple[float | None, float | None]:
        """Hours on the clock, and GPU-hours as `control.progress.gpu_hours` counts them. An evaluation beside the next round's rollouts
        asks for no GPUs of its own, and lengthens the run only where it outlasts them."""
        wall = paid = 0.0
        student = self.student.gpus if self.student else 0
        for before, this in _with_previous(rounds):
            rollout, trained, evaluated = this.rollout_seconds, this.training_seconds, this.evaluation_seconds
            if rollout is None or trained is None or evaluated is None:
                return None, None
            change = self.assumed.change_seconds if self.trains or this is rounds[0] else 0.0
            overlaps = self.spec.evaluation.overlap is Overlap.NEXT_ROUND
            beside = (before.evaluation_seconds or 0.0) if before is not None and overlaps else 0.0
            alone = evaluated if not overlaps or this is rounds[-1] else 0.0
            serves = change + max(rollout, beside)
            wall += serves + trained + alone
            paid += serves * serving + trained * (training + (0 if shared else serving)) + alone * student
        return wall / 3600, paid / 3600


def _with_previous(rounds: tuple[RoundEstimate, ...]) -> Iterator[tuple[RoundEstimate | None, RoundEstimate]]:
    return zip((None, *rounds[:-1]), rounds, strict=True)
