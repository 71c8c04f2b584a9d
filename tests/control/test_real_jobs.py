"""What the plan expects of the Job controller, asked of a real one."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.control import Child, ChildState, Results, StageName, Step, Trouble, children
from dagger_operator.control.failures import given_up
from dagger_operator.control.jobs import build_job

pytestmark = pytest.mark.heavy

Json = dict[str, Any]
STEP = Step(1, StageName.ROLLOUT)
SAYS_SO = """echo '{"reason": "StorageUnavailable", "message": "connection refused"}' >/dev/termination-log; exit 75"""


def seen(cluster: Any, namespace: str) -> Child:
    found = json.loads(cluster.kubectl("get", "jobs,pods", f"--namespace={namespace}", "-o", "json"))["items"]
    (job,) = children((one for one in found if one["kind"] == "Job"), [one for one in found if one["kind"] == "Pod"], datetime.now(UTC))
    return job


def test_what_infrastructure_ends_counts_on_its_budget_alone_and_the_job_is_ended_for_good(
    make_run: Callable[..., DAggerRun], cluster: Any, namespace: str
) -> None:
    run = make_run(failurePolicy={"infrastructureRetries": 1}, rollouts={"workers": 1})
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"namespace": namespace, "uid": None})})

    def apply(**how: Any) -> None:
        job = build_job(run, STEP, Results(), **how)
        (stage,) = job["spec"]["template"]["spec"]["containers"]
        stage |= {"image": "localhost/busybox:1", "command": ["sh", "-c", SAYS_SO], "resources": {}}
        del stage["envFrom"]
        stage["env"] = [one for one in stage["env"] if "secretKeyRef" not in one.get("valueFrom", {})]
        job["spec"]["backoffLimit"] = 0
        cluster.kubectl("apply", "--server-side", "--field-manager=dagger-operator", "-f", "-", input=json.dumps(job))

    def until(condition: Callable[[Child], Any]) -> Child:
        deadline = time.monotonic() + 180
        while not condition(job := seen(cluster, namespace)):
            assert time.monotonic() < deadline, job
            time.sleep(0.5)
        return job

    apply()
    job = until(lambda one: given_up(run, STEP.stage, one, 1))
    assert [(failure.reason, failure.exit_code) for failure in job.failures] == [("StorageUnavailable", 75)] * 2
    assert job.state is ChildState.WAITING, "its own budget is 0, and none of it is spent"
    trouble = given_up(run, STEP.stage, job, 1)
    assert trouble is not None
    apply(given_up=trouble)
    ended = until(lambda one: one.pods == 0)
    assert (ended.state, ended.holds) == (ChildState.FAILED, False)
    assert ended.trouble == Trouble(trouble.reason, trouble.message)
    assert len(ended.failures) == 2, "pods that ended stay with their Job"
