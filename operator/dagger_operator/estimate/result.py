"""The result of an estimate."""

from dataclasses import dataclass

from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import Gpu
from dagger_operator.estimate.host import ServingPod, TrainingNode
from dagger_operator.estimate.memory import Memory
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.workload import Tokens


@dataclass(frozen=True)
class RoundEstimate:
    """The needs of one round. Seconds are None if no GPU does the work: the formulas cover no other hardware."""

    round: int
    teacher_share: float
    """Share of turns in which the teacher acts."""
    rollouts: int
    labels: int
    """One per turn; also the number of teacher calls, since an acting teacher's turn is its label."""
    student_calls: float
    teacher_prompt_tokens: float
    """Tokens of all prompts sent to the teacher; most are in its prefix cache."""
    teacher_output_tokens: float
    steps: int
    trees: Tokens
    """What training passes through the model, over all steps, as trees."""
    per_label: Tokens
    """The same with one sequence per label."""
    rollout_seconds: float | None
    """Includes the evaluation that runs concurrently, of the previous round's student."""
    training_seconds: float | None
    """With the packing that the run configures."""
    training_seconds_per_label: float | None
    evaluation_seconds: float | None
    """Includes the next round's rollouts if they run concurrently."""
    rollout_gpu_hours: float | None
    """GPUs held during the stage times the hours, as summed in `Estimate.gpu_hours`; None if a stage's time is unknown."""
    training_gpu_hours: float | None
    evaluation_gpu_hours: float | None
    """If it runs beside rollouts, only the GPU-hours during which the run waits for it."""

    @property
    def saved(self) -> float:
        """Factor by which trees reduce the number of tokens."""
        return self.per_label.tokens / self.trees.tokens if self.trees.tokens else 1.0


@dataclass(frozen=True)
class Estimate:
    """Everything that `daggerctl estimate` reports about a run."""

    assumed: Assumptions
    gpu: Gpu
    rounds: tuple[RoundEstimate, ...]
    training: Memory | None
    """Memory of one GPU; None if nothing is trained on GPUs."""
    training_node: TrainingNode | None
    """Host resources of its node."""
    student: Pool | None
    """None: not served on GPUs."""
    teacher: Pool | None
    student_pod: ServingPod | None
    teacher_pod: ServingPod | None
    gpus: int
    """GPUs that must be available at once."""
    initial_evaluation_seconds: float | None
    """Time of evaluating the initial student, as `RoundEstimate.evaluation_seconds`; 0 if the run requests no such evaluation."""
    initial_evaluation_gpu_hours: float | None
    """GPU-hours of that evaluation, as `RoundEstimate.evaluation_gpu_hours`; None if the run requests none."""
    hours: float | None
    """From preflight to the last stage; None if a stage's time is unknown."""
    gpu_hours: float | None
    """GPUs times the hours of every stage that requests them, as `status.gpuHours` counts them."""
    findings: tuple[Finding, ...]

    @property
    def mean_state(self) -> float:
        """Average number of tokens before a turn."""
        return self.assumed.first_tokens + (self.assumed.turns - 1) * self.assumed.turn_growth / 2

    @property
    def fits(self) -> bool:
        """Whether the run can work as specified."""
        return not any(finding.fatal for finding in self.findings)
