"""Which edits of a run leave its checkpoints what they are."""

from types import SimpleNamespace
from typing import Any

from dagger_operator.api import Training
from dagger_operator.training.inputs import Inputs


def course(**training: Any) -> dict[str, Any]:
    """What a checkpoint of this training must agree with to be resumed."""
    spec: Any = SimpleNamespace(training=Training.model_validate(training), seed=1)
    given = Inputs("parent", "base", data=SimpleNamespace(digest="data"))  # type: ignore[arg-type]  # of which only the digest counts
    return given.course(SimpleNamespace(run=SimpleNamespace(spec=spec), round=1))  # type: ignore[arg-type]  # all that is asked of it


def test_a_longer_notice_or_rarer_checkpoints_restart_no_training() -> None:
    assert course() == course(terminationGracePeriodSeconds=900, checkpointEverySteps=7, retries=1)
    assert course() != course(learningRate=1e-5)
