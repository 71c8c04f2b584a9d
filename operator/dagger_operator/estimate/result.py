"""What an estimate says."""

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
    """What one round takes. Seconds are None where no GPU does the work: the formulas know no other hardware."""

    round: int
    teacher_share: float
    """Share of turns in which the teacher acts."""
    rollouts: int
    labels: int
    """One for each turn; teacher calls are as many, since an acting teacher's turn is its label."""
    student_calls: float
    teacher_prompt_tokens: float
    """Tokens of all prompts that the teacher is sent; most are in its prefix cache."""
    teacher_output_tokens: float
    steps: int
    trees: Tokens
    """What training passes through the model, over all steps, as trees."""
    per_label: Tokens
    """The same with a sequence for each label."""
    rollout_seconds: float | None
    """With the evaluation that goes beside them, of the student of the round before."""
    training_seconds: float | None
    """In the packing that the run asks for."""
    training_seconds_per_label: float | None
    evaluation_seconds: float | None
    """With the rollouts of the next round, where it goes beside them."""
    rollout_gpu_hours: float | None
    """GPUs that are held meanwhile times the hours, as `Estimate.gpu_hours` sums them up; None where a stage's time is not known."""
    training_gpu_hours: float | None
    evaluation_gpu_hours: float | None
    """Beside rollouts only those for which the run waits for it."""

    @property
    def saved(self) -> float:
        """How many times fewer tokens trees take."""
        return self.per_label.tokens / self.trees.tokens if self.trees.tokens else 1.0


@dataclass(frozen=True)
class Estimate:
    """All that `daggerctl estimate` says of a run."""

    assumed: Assumptions
    gpu: Gpu
    rounds: tuple[RoundEstimate, ...]
    training: Memory | None
    """Of one GPU; None where nothing is trained on GPUs."""
    training_node: TrainingNode | None
    """The same of its node, beside GPUs."""
    student: Pool | None
    """None: not served on GPUs."""
    teacher: Pool | None
    student_pod: ServingPod | None
    teacher_pod: ServingPod | None
    gpus: int
    """GPUs that must be there at once."""
    initial_evaluation_seconds: float | None
    """Of the evaluation of the initial student, as `RoundEstimate.evaluation_seconds`; 0 where the run asks for none."""
    hours: float | None
    """From preflight to the last stage; None where a stage's time is not known."""
    gpu_hours: float | None
    """GPUs times the hours of every stage that asks for them, as `status.gpuHours` counts them."""
    findings: tuple[Finding, ...]

    @property
    def mean_state(self) -> float:
        """Tokens before a turn, on average."""
        return self.assumed.first_tokens + (self.assumed.turns - 1) * self.assumed.turn_growth / 2

    @property
    def fits(self) -> bool:
        """Whether the run can work as it is written."""
        return not any(finding.fatal for finding in self.findings)
