"""What the operator adds to a run that leaves it open."""

from collections.abc import Callable

from dagger_operator.api import DAggerRun
from dagger_operator.cluster.reconcile import completed
from dagger_operator.cluster.settings import Settings

Make = Callable[..., DAggerRun]
SETTINGS = Settings(sandbox_namespace="sandboxes", helper_image="reg/helper:2", worker_image="reg/worker:2", trainer_image="reg/trainer:2")


def open_fields(run: DAggerRun) -> tuple[str | None, ...]:
    spec = run.spec
    return spec.sandbox.namespace, spec.sandbox.helper_image, spec.image, spec.training.image


def test_what_a_run_leaves_open_is_the_operators_and_nothing_else_is_changed(make_run: Make) -> None:
    run = make_run()
    filled = completed(run, SETTINGS)
    assert open_fields(filled) == ("sandboxes", "reg/helper:2", "reg/worker:2", "reg/trainer:2")
    assert open_fields(run) == (None,) * 4, "the run itself is as its user wrote it"
    assert filled.status == run.status
    assert completed(run, Settings()) == run


def test_what_a_run_names_is_its_own(make_run: Make) -> None:
    run = make_run()
    sandbox = run.spec.sandbox.model_copy(update={"namespace": "mine", "helper_image": "my/helper"})
    training = run.spec.training.model_copy(update={"image": "my/trainer"})
    spec = run.spec.model_copy(update={"image": "my/worker", "sandbox": sandbox, "training": training})
    named = run.model_copy(update={"spec": spec})
    assert open_fields(completed(named, SETTINGS)) == ("mine", "my/helper", "my/worker", "my/trainer")
