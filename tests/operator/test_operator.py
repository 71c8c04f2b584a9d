"""The operator against a real API server: what a run goes through from YAML to its end."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.cluster.cache import Cache
from dagger_operator.cluster.reaper import GRACE, Reaper
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.watches import Watches

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Json = dict[str, Any]


def condition(run: Json, kind: str) -> Json:
    found: Json = next(one for one in run["status"]["conditions"] if one["type"] == kind)
    return found


async def test_a_run_goes_through_its_rounds_and_says_how_it_went(
    lab: Any, operator: Any, prometheus: Any, documented_metrics: Any
) -> None:
    prometheus.watch("operator", f"127.0.0.1:{operator.metrics_port}")
    await lab.create(rounds=2)
    run = await lab.until_phase("Succeeded")

    assert condition(run, "Succeeded")["status"] == "True"
    assert {one["observedGeneration"] for one in run["status"]["conditions"]} == {run["metadata"]["generation"]}
    assert run["status"]["resolved"] == "27.3%"
    assert [one["round"] for one in run["status"]["rounds"]] == [1, 2]
    stages = Counter(name.rsplit("-", 2)[1] for name in lab.jobs.values())
    assert stages == {"prepare": 1, "preflight": 1, "rollout": 2, "training": 2, "publish": 2, "evaluation": 2}
    assert "finalizers" not in run["metadata"], "a run can be deleted without the operator"
    assert run["metadata"]["generation"] == 1, "the spec is never written"

    async def told() -> bool:
        """Events come after the status that they tell of."""
        events = lab.client.list("v1", "Event", lab.namespace, fieldSelector="involvedObject.kind=DAggerRun")
        return {"StageStarting", "RoundsDone"} <= {one["reason"] async for one in events}

    await lab.until(told)

    async def released() -> bool:
        return not await lab.objects("apps/v1", "Deployment")

    await lab.until(released)
    exposition = operator.metrics()
    assert f'dagger_run_info{{phase="Succeeded",reason="RoundsDone",run="demo",run_namespace="{lab.namespace}"}} 1.0' in exposition
    assert _sum(exposition, 'dagger_runs{phase="Succeeded"}') >= 1
    assert _sum(exposition, 'dagger_stage_seconds_count{outcome="Succeeded",stage="rollout"}') >= 2
    assert operator.ask("/livez") == operator.ask("/readyz") == (200, "ok")
    assert prometheus.lint(exposition.encode()) == ""

    async def scraped() -> bool:
        return await asyncio.to_thread(prometheus.value, 'dagger_runs{phase="Succeeded"}') == 1

    await lab.until(scraped)
    assert documented_metrics.differences(prometheus.series("operator"), "Operator") == []

    await lab.delete()

    async def gone() -> bool:
        return lab.namespace not in operator.metrics()

    await lab.until(gone)


async def test_what_is_as_it_should_be_is_not_written_again(lab: Any, operator: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create()
    await lab.until_job("rollout")
    await lab.until_phase("Rollout")  # the last status there is while its pods do nothing
    first, before = await lab.run(), operator.metrics()
    looks = reconciles(before)

    async def looked_again() -> bool:
        return reconciles(operator.metrics()) >= looks + 1

    await lab.until(looked_again)
    assert writes(operator.metrics()) == writes(before), "another look writes nothing"
    assert (await lab.run())["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]

    server = next(one for one in await lab.objects("apps/v1", "Deployment"))
    await lab.client.patch(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": server["metadata"] | {"resourceVersion": None}, "spec": {"replicas": 3}}
    )

    async def put_right() -> bool:
        return (await lab.client.get("apps/v1", "Deployment", lab.namespace, "demo-student"))["spec"]["replicas"] == 1

    await lab.until(put_right)


def reconciles(exposition: str) -> float:
    return _sum(exposition, "dagger_operator_reconcile_seconds_count")


def writes(exposition: str) -> float:
    """Requests that write, but for those of the Lease."""
    return _sum(exposition, 'rest_client_requests_total{code="200",method="PATCH"') + _sum(
        exposition, 'rest_client_requests_total{code="201"'
    )


def _sum(exposition: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in exposition.splitlines() if line.startswith(name))


async def test_suspended_and_resumed(lab: Any, operator: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create()
    job = await lab.until_job("rollout")
    await lab.edit(suspend=True)
    await lab.until_phase("Suspended")
    held = await lab.client.get("batch/v1", "Job", lab.namespace, job["metadata"]["name"])
    assert held["spec"]["suspend"] is True
    assert (await lab.client.get("apps/v1", "Deployment", lab.namespace, "demo-student"))["spec"]["replicas"] == 0
    lab.paused = set()
    await lab.edit(suspend=False)
    await lab.until_phase("Succeeded")
    assert len([name for name in lab.jobs.values() if "-rollout-" in name]) == 1, "the same Job went on"


async def test_an_edit_in_flight_makes_one_new_attempt(lab: Any, operator: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create_short()
    first = await lab.until_job("rollout")
    await lab.edit(rollouts={"concurrency": 3})

    async def replaced() -> bool:
        return (await lab.until_job("rollout"))["metadata"]["uid"] != first["metadata"]["uid"]

    await lab.until(replaced)
    lab.paused = set()
    await lab.until_phase("Succeeded")
    assert len([name for name in lab.jobs.values() if "-rollout-" in name]) == 2


async def test_a_failed_job_deleted_by_hand_is_a_retry(lab: Any, operator: Any) -> None:
    lab.failing = {"rollout"}
    await lab.create_short()
    run = await lab.until_phase("Failed")
    assert run["status"]["reason"] == "TaskSourceMissing"
    assert "there are no tasks" in condition(run, "Failed")["message"]
    lab.failing = set()
    failed = await lab.until_job("rollout")
    await lab.client.delete("batch/v1", "Job", lab.namespace, failed["metadata"]["name"], preconditions={})
    await lab.until_phase("Succeeded")


async def test_a_job_that_loses_its_label_while_it_works_gets_it_back(lab: Any, operator: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create_short()
    job = await lab.until_job("rollout")
    labels = {"app.kubernetes.io/managed-by": None}
    metadata = {"name": job["metadata"]["name"], "namespace": lab.namespace, "labels": labels}
    await lab.client.patch({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata})

    async def suspended() -> bool:
        return bool((await lab.until_job("rollout"))["spec"].get("suspend"))

    await lab.until_job("rollout")
    await lab.edit(suspend=True)
    await lab.until(suspended)
    await lab.edit(suspend=False)
    lab.paused = set()
    await lab.until_phase("Succeeded")
    assert [uid for uid, name in lab.jobs.items() if "-rollout-" in name] == [job["metadata"]["uid"]]


async def test_a_run_that_another_manages_is_left_alone_and_one_that_does_not_do_says_why(lab: Any, operator: Any) -> None:
    await lab.create_short("theirs", managedBy="example.com/queue")
    arguments = ["x" * 2000] * 60
    await lab.create_short("large", scaffold={"type": "Command", "command": arguments})
    run = await lab.until_reason("InvalidSpec", "large")
    assert "write at most" in condition(run, "Accepted")["message"]
    assert "status" not in await lab.run("theirs")
    assert await lab.objects("batch/v1", "Job") == []


async def test_a_run_is_deleted_when_its_time_is_over(lab: Any, operator: Any) -> None:
    await lab.create_short(ttlSecondsAfterFinished=1)

    async def gone() -> bool:
        return not [one async for one in lab.client.list("dagger-operator.dev/v1alpha1", "DAggerRun", lab.namespace)] and bool(lab.jobs)

    await lab.until(gone)


async def test_storage_that_is_away_is_waited_for(lab: Any, operator: Any) -> None:
    lab.paused = {"rollout"}
    await lab.create_short(storage={"url": f"file://{lab.folder}/demo", "secretRef": {"name": "keys"}})
    run = await lab.until_reason("StorageUnavailable")
    assert "Secret keys in namespace" in condition(run, "Progressing")["message"]
    await lab.client.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys", "namespace": lab.namespace}, "data": {}})
    await lab.until_job("rollout")

    folder, away = Path(lab.folder) / "demo", Path(lab.folder) / "away"
    folder.rename(away)
    folder.write_text("no folder")
    await lab.until_reason("StorageUnavailable")
    assert len(await lab.objects("batch/v1", "Job")) == 3, "nothing is thrown away while nothing is known"
    folder.unlink()
    away.rename(folder)
    lab.paused = set()
    await lab.until_phase("Succeeded")


async def test_what_no_owner_reference_clears_is_cleared(lab: Any) -> None:
    mine = {"app.kubernetes.io/managed-by": "dagger-operator", "dagger-operator.dev/run-namespace": lab.namespace}

    async def make(api_version: str, kind: str, name: str, run: str, **more: Any) -> None:
        metadata = {"name": name, "namespace": lab.namespace, "labels": {**mine, "dagger-operator.dev/run": run}}
        await lab.client.create({"apiVersion": api_version, "kind": kind, "metadata": metadata, **more})

    await lab.create_short("alive")
    role = {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "dagger-sandbox-worker"}}
    for run in ("alive", "gone"):
        await make("rbac.authorization.k8s.io/v1", "RoleBinding", f"{lab.namespace}.{run}.worker", run, **role)
    for name in ("renewed", "stale"):
        await make("coordination.k8s.io/v1", "Lease", name, "alive", spec={"leaseTransitions": 0, "leaseDurationSeconds": 30})

    async def renew(times: int) -> None:
        lease = await lab.client.get("coordination.k8s.io/v1", "Lease", lab.namespace, "renewed")
        await lab.client.replace({**lease, "spec": {**lease["spec"], "leaseTransitions": times}})

    # Made by hand: it wears the labels of a sandbox, and no Lease owns it.
    container = {"name": "main", "image": "localhost/none:1"}
    labels = {**mine, "app.kubernetes.io/component": "sandbox", "dagger-operator.dev/run": "gone", "dagger-operator.dev/component": "none"}
    lab.paused = {"none"}
    metadata = {"name": "by-hand", "namespace": lab.namespace, "labels": labels}
    await lab.client.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}})

    cache, woken = Cache(), []
    looks = [0.0, 60.0, 31.0 + GRACE, 32.0 + GRACE, 33.0 + GRACE]
    reaper = Reaper(lab.namespace, cache, lab.client, woken.append, iter(looks).__next__)
    removed = []
    for times in range(4):
        removed.append(await reaper.reap())
        await renew(times + 1)
    assert removed == [1, 0, 1, 0], "the binding at once, the Lease once it stood still for long enough before our eyes"
    for binding in await lab.objects("rbac.authorization.k8s.io/v1", "RoleBinding"):
        cache.put(binding)
        lost = {**binding, "metadata": binding["metadata"] | {"name": f"{lab.namespace}.lost.worker", "uid": "another"}}
        lost["metadata"]["labels"] = {**mine, "dagger-operator.dev/run": "lost"}
        cache.put(lost)
    await reaper.reap()
    assert woken == [(lab.namespace, "lost")], "what went is made again"
    left = [
        one["metadata"]["name"]
        for kind in (("rbac.authorization.k8s.io/v1", "RoleBinding"), ("coordination.k8s.io/v1", "Lease"))
        for one in await lab.objects(*kind)
    ]
    assert left == [f"{lab.namespace}.alive.worker", "renewed"]
    assert "by-hand" in [one["metadata"]["name"] for one in await lab.objects("v1", "Pod")]


async def test_what_went_while_nobody_watched_is_found_out_by_a_fresh_list(lab: Any) -> None:
    woken: list[Any] = []
    cache = Cache()
    watches = Watches(Settings(), cache, lab.client, wake=woken.append, gone=lambda _: None, heard=lambda *_: None)
    run = await lab.create_short("there")
    for name, uid in (("there", run["metadata"]["uid"]), ("gone", "gone")):
        cache.put({**run, "metadata": run["metadata"] | {"name": name, "uid": uid}})
    watches._listed("daggerruns", None, since=float("inf"))

    async def found_out() -> bool:
        return woken == [(lab.namespace, "gone")]

    await lab.until(found_out)
    assert [one["metadata"]["name"] for one in cache.of_kind("DAggerRun")] == ["there"]
