"""What the operator's own settings add to what a plan is made of."""

from collections.abc import Callable
from typing import Any

from dagger_operator.api import DAggerRun
from dagger_operator.cluster.cache import Cache
from dagger_operator.cluster.observe import Observer
from dagger_operator.cluster.reconcile import completed
from dagger_operator.cluster.settings import Settings
from dagger_operator.control import Results

Make = Callable[..., DAggerRun]
SETTINGS = Settings(
    sandbox_namespace="sandboxes",
    helper_image="reg/helper:2",
    sandbox_priority_class="last",
    worker_image="reg/worker:2",
    trainer_image="reg/trainer:2",
)


def open_fields(run: DAggerRun) -> tuple[str | None, ...]:
    spec = run.spec
    return spec.sandbox.namespace, spec.sandbox.helper_image, spec.sandbox.pod.priority_class_name, spec.image, spec.training.image


def test_what_a_run_leaves_open_is_the_operators_and_nothing_else_is_changed(make_run: Make) -> None:
    run = make_run()
    filled = completed(run, SETTINGS)
    assert open_fields(filled) == ("sandboxes", "reg/helper:2", "last", "reg/worker:2", "reg/trainer:2")
    assert open_fields(run) == (None,) * 5, "the run itself is as its user wrote it"
    assert filled.status == run.status
    assert completed(run, Settings()) == run


def test_what_a_run_names_is_its_own(make_run: Make) -> None:
    run = make_run()
    pod = run.spec.sandbox.pod.model_copy(update={"priority_class_name": "first"})
    sandbox = run.spec.sandbox.model_copy(update={"namespace": "mine", "helper_image": "my/helper", "pod": pod})
    training = run.spec.training.model_copy(update={"image": "my/trainer"})
    spec = run.spec.model_copy(update={"image": "my/worker", "sandbox": sandbox, "training": training})
    named = run.model_copy(update={"spec": spec})
    assert open_fields(completed(named, SETTINGS)) == ("mine", "my/helper", "first", "my/worker", "my/trainer")


class NoResults:
    async def read(self, run: DAggerRun) -> tuple[Results, dict[Any, Any]]:
        return Results(), {}


async def test_plans_are_told_who_may_scrape(make_run: Make) -> None:
    agent = {"podSelector": {"matchLabels": {"app": "agent"}}}
    nobody_to_ask: Any = None
    no_results: Any = NoResults()
    observed = await Observer(Cache(), nobody_to_ask, no_results, (agent,)).observe(make_run(), None)
    assert observed.scrapers == (agent,)
