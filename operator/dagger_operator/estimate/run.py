"""The estimate of a whole run: each round, all rounds, and what does not fit."""

import math
from collections.abc import Mapping

from dagger_operator.api import Aggregation, BatchUnit, PodSettings, RunSpec, Serving, TrainingMode
from dagger_operator.api.course import Cost, StageName, Step, cost_by_step, gpus_held, spans
from dagger_operator.api.training import Packing
from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.fit import findings
from dagger_operator.estimate.hardware import Gpu
from dagger_operator.estimate.host import Need, ServingPod, is_folder, serving_pod, training_node
from dagger_operator.estimate.memory import Setup, training_memory
from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.result import Estimate, RoundEstimate
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.time import NOTHING, Acting, Load, Pace, side_by_side, training_seconds
from dagger_operator.estimate.workload import Conversation, Tokens, teacher_share


def estimate(spec: RunSpec, gpu: Gpu, student: Shape, teacher: Shape | None, assumed: Assumptions) -> Estimate:
    """Return the estimate of a run; `teacher` is None for an endpoint."""
    return _Planner(spec, gpu, student, teacher, assumed).estimate()


class _Planner:
    def __init__(self, spec: RunSpec, gpu: Gpu, student: Shape, teacher: Shape | None, assumed: Assumptions) -> None:
        self.spec, self.gpu, self.shape, self.assumed = spec, gpu, student, assumed
        self.talk = Conversation(assumed.turns, assumed.first_tokens, assumed.turn_growth, assumed.turn_tokens, student.hybrid)
        self.student, self.teacher = self._pool(spec.student.served, student), self._pool(spec.teacher.serving, teacher)
        self.trains = spec.training.mode is TrainingMode.ENABLED
        self.shares = [teacher_share(spec.mixing, number, assumed.turns) for number in range(1, spec.rounds + 1)]
        self.labels_of_a_step = spec.training.batch_size if spec.training.batch_unit is BatchUnit.LABELS else None
        most = spec.training.micro_batch_tokens
        self.trees = {share: self.talk.trees(share, most, self.labels_of_a_step) for share in set(self.shares)}
        self.per_label = self.talk.per_label()
        self.acting = Acting(self.talk, spec.rollouts.workers * spec.rollouts.concurrency, self.student, self.teacher, assumed)

    def estimate(self) -> Estimate:
        took = self._seconds()
        costs = None if None in took.values() else cost_by_step(self.spec, lambda step: took[step] or 0.0)
        rounds = tuple(self._round(number, took, costs) for number in range(1, self.spec.rounds + 1))
        on_gpus = self.trains and self.spec.training.gpus_per_node > 0
        memory = training_memory(self.shape, Setup.of(self.spec.training)) if on_gpus else None
        node = training_node(self.shape, self.spec.training, memory, self._label_tokens()) if memory is not None else None
        student, teacher = self._pod(self.student, 2), self._pod(self.teacher, 0 if is_folder(self.spec.teacher.model) else 1)
        needs: list[tuple[str, PodSettings, Need]] = [("training.pod", self.spec.training.pod, node)] if node is not None else []
        for role, pool, pod in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if pool is not None and pod is not None:
                needs.append((f"{role}.serving.pod", pool.serving.pod, pod))
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
            gpus=max(gpus_held(self.spec, step) for step in took),
            initial_evaluation_seconds=took.get(Step(0, StageName.EVALUATION), 0.0),
            initial_evaluation_gpu_hours=_gpu_hours(costs, Step(0, StageName.EVALUATION)),
            hours=sum(one.seconds for one in costs.values()) / 3600 if costs else None,
            gpu_hours=sum(one.gpu_seconds for one in costs.values()) / 3600 if costs else None,
            findings=findings(self.spec, self.gpu, self.shape, memory, self.student, self.teacher, needs, self.talk, self._in_flight()),
        )

    def _pool(self, serving: Serving | None, shape: Shape | None) -> Pool | None:
        return Pool(serving, shape, self.gpu, self.assumed) if serving is not None and serving.gpus and shape is not None else None

    def _pod(self, pool: Pool | None, versions: int) -> ServingPod | None:
        return serving_pod(pool.shape, pool.serving, versions) if pool is not None else None

    def _round(self, number: int, took: Mapping[Step, float | None], costs: Mapping[Step, Cost] | None) -> RoundEstimate:
        share = self.shares[number - 1]
        rollouts = self._rollouts(number)
        turns = rollouts * self.talk.turns
        steps, trees, per_label = self._training(number)
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
            rollout_seconds=took[Step(number, StageName.ROLLOUT)],
            training_seconds=took.get(Step(number, StageName.TRAINING), 0.0),
            training_seconds_per_label=self._training_seconds(per_label, steps),
            evaluation_seconds=took.get(Step(number, StageName.EVALUATION), 0.0),
            rollout_gpu_hours=_gpu_hours(costs, Step(number, StageName.ROLLOUT)),
            training_gpu_hours=_gpu_hours(costs, Step(number, StageName.TRAINING)),
            evaluation_gpu_hours=_gpu_hours(costs, Step(number, StageName.EVALUATION)),
        )

    def _rollouts(self, number: int) -> int:
        return self.spec.tasks.count_at(number) * self.spec.tasks.rollouts_per_task

    def _training(self, number: int) -> tuple[int, Tokens, Tokens]:
        """Return the optimiser steps of a round, and what passes through the model in all of them: the trajectories of its aggregation,
        as often as `epochs` or `steps` require."""
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
        """Return the rounds whose trajectories a round trains on."""
        return range(number if self.spec.training.aggregation is Aggregation.CURRENT_ROUND_ONLY else 1, number + 1)

    def _label_tokens(self) -> float:
        """Return the tokens held for all labels of the largest round: each trajectory's last state, and the labels."""
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

    def _seconds(self) -> dict[Step, float | None]:
        """Return the seconds of every step; None if unknown."""
        took: dict[Step, float | None] = {}
        for span in spans(self.spec):
            took |= {step: self._pace(step) for step in span.steps}
            if span.beside is not None:
                first = span.steps[0]
                took[first], took[span.beside] = self._together(first, span.beside)
        return took

    def _together(self, rollout: Step, evaluation: Step) -> tuple[float | None, float | None]:
        """Return the seconds of `rollout`, the first step of a span, and of `evaluation` beside the span; later steps count as no load."""
        alone = self._pace(rollout), self._pace(evaluation)
        slowed = self._pace(rollout, self._load(evaluation)), self._pace(evaluation, self._load(rollout))
        if alone[0] is None or alone[1] is None or slowed[0] is None or slowed[1] is None:
            return alone
        return side_by_side(Pace(alone[0], slowed[0]), Pace(alone[1], slowed[1]))

    def _pace(self, step: Step, beside: Load = NOTHING) -> float | None:
        """Return the seconds of one step while other steps put the load `beside` on the student."""
        student, teacher = self._on_cpu(self.spec.student.served), self._on_cpu(self.spec.teacher.serving)
        match step.stage:
            case StageName.ROLLOUT:
                rollouts, share = self._rollouts(step.round), self.shares[step.round - 1]
                return None if teacher or (student and share < 1) else self.acting.rollout_seconds(self.spec, rollouts, share, beside)
            case StageName.EVALUATION:
                most_turns = self.spec.evaluation.max_turns
                return None if student else self.acting.evaluation_seconds(self.assumed.held_out, most_turns, beside)
            case StageName.TRAINING:
                steps, trees, per_label = self._training(step.round)
                return self._training_seconds(trees if self.spec.training.packing is Packing.TREES else per_label, steps)
            case StageName.PREFLIGHT | StageName.PUBLISH:
                return self.assumed.change_seconds
        return 0.0

    def _load(self, step: Step) -> Load:
        """Return the load of a step on the student."""
        match step.stage:
            case StageName.ROLLOUT:
                return self.acting.rollout_load(self._rollouts(step.round), self.shares[step.round - 1])
            case StageName.EVALUATION:
                return self.acting.evaluation_load(self.assumed.held_out)
        return NOTHING

    def _in_flight(self) -> dict[str, int]:
        """Return the number of concurrent conversations, by the policy that should keep their prefixes."""
        student = max(
            self._load(span.steps[0]).in_flight + (self._load(span.beside).in_flight if span.beside else 0) for span in spans(self.spec)
        )
        return {"student": student, "teacher": min(self.acting.most, max(map(self._rollouts, range(1, self.spec.rounds + 1))))}

    def _on_cpu(self, serving: Serving | None) -> bool:
        return serving is not None and serving.gpus == 0


def _gpu_hours(costs: Mapping[Step, Cost] | None, step: Step) -> float | None:
    cost = costs.get(step) if costs else None
    return cost.gpu_seconds / 3600 if cost else None
