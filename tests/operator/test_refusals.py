"""What the API server refuses, and what a stranger left in the way: the run says so and waits."""

import asyncio
import json
from typing import Any

import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Json = dict[str, Any]


def quota(namespace: str, **hard: str) -> Json:
    hard = {name.replace("_", "."): value for name, value in hard.items()}
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": namespace}, "spec": {"hard": hard}}


@pytest.mark.parametrize("hard", [{"count/jobs.batch": "0"}, {"pods": "0"}], ids=["no Jobs", "no pods"])
async def test_a_quota_that_is_used_up_is_named_and_waited_for(lab: Any, operator: Any, hard: dict[str, str]) -> None:
    await lab.client.create(quota(lab.namespace, **hard))

    async def counted() -> bool:
        return "used" in ((await lab.client.get("v1", "ResourceQuota", lab.namespace, "none")).get("status") or {})

    await lab.until(counted)
    await lab.create_short()
    run = await lab.until_reason("QuotaExceeded")
    (progressing,) = (one for one in run["status"]["conditions"] if one["type"] == "Progressing")
    assert progressing["status"] == "False"
    assert "exceeded quota: none" in progressing["message"]
    assert "have the quota raised, or ask for less: spec.rollouts.pod.resources" in progressing["message"]
    await lab.client.delete("v1", "ResourceQuota", lab.namespace, "none", preconditions={})
    await lab.until_phase("Succeeded")


async def test_a_run_that_failed_by_a_quota_goes_on_once_it_is_raised_and_makes_nothing_before(lab: Any, operator: Any) -> None:
    await lab.client.create(quota(lab.namespace, **{"count/deployments.apps": "1"}))
    # One of the two servers fits.
    served = {"model": "t", "serving": {"gpus": 0}}
    await lab.create(teacher=served, preRunningDeadlineSeconds=1, failurePolicy={"keep": "Nothing"})
    assert (await lab.until_phase("Failed"))["status"]["reason"] == "QuotaExceeded"

    async def servers() -> set[tuple[str, int, int]]:
        there = await lab.objects("apps/v1", "Deployment")
        return {(one["metadata"]["uid"], one["metadata"]["generation"], one["spec"]["replicas"]) for one in there}

    async def one_at_zero() -> bool:
        return [replicas for _, _, replicas in await servers()] == [0]

    await lab.until(one_at_zero)
    rests = await servers()
    await asyncio.sleep(25)
    assert (await lab.run())["status"]["phase"] == "Failed"
    assert await servers() == rests
    await lab.client.delete("v1", "ResourceQuota", lab.namespace, "none", preconditions={})
    await lab.until_phase("Succeeded")


async def test_an_admission_webhook_that_is_down_is_named_and_waited_for(lab: Any, operator: Any, control_plane: Any) -> None:
    name = f"down.{lab.namespace}.example.org"
    webhook = {
        "name": name,
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": lab.namespace}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 1,
    }
    kind = "ValidatingWebhookConfiguration"
    document = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": name}, "webhooks": [webhook]}
    control_plane.kubectl("create", "-f", "-", input=json.dumps(document))
    try:
        await asyncio.sleep(2)  # the API server hears of it a moment later
        await lab.create_short()
        run = await lab.until_reason("InternalError")
        (progressing,) = (one for one in run["status"]["conditions"] if one["type"] == "Progressing")
        assert f'failed calling webhook "{name}"' in progressing["message"]
    finally:
        control_plane.kubectl("delete", kind, name)
    await lab.until_phase("Succeeded")


async def test_a_strangers_object_of_the_same_name_is_not_touched(lab: Any, operator: Any) -> None:
    container = {"name": "web", "image": "web"}
    labels = {"app": "web"}
    theirs = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "demo-student", "namespace": lab.namespace},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}}},
    }
    made = await lab.client.create(theirs)
    await lab.create()
    await lab.until_reason("NameTaken")
    seen = await lab.client.get("apps/v1", "Deployment", lab.namespace, "demo-student")
    assert seen["metadata"]["generation"] == made["metadata"]["generation"]
    assert "labels" not in seen["metadata"]
    await lab.client.delete("apps/v1", "Deployment", lab.namespace, "demo-student", preconditions={})
    await lab.until_phase("Succeeded")


async def test_a_pod_and_a_job_that_wear_the_labels_confuse_nobody(lab: Any, operator: Any) -> None:
    labels = {
        "app.kubernetes.io/managed-by": "dagger-operator",
        "dagger-operator.dev/run": "demo",
        "dagger-operator.dev/component": "rollout",
        "dagger-operator.dev/round": "1",
        "dagger-operator.dev/attempt": "00000000",
    }
    lab.paused = {"rollout"}
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}
    await lab.client.create(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worn", "namespace": lab.namespace, "labels": labels}, "spec": pod}
    )
    job = {"template": {"metadata": {"labels": labels}, "spec": pod}}
    await lab.client.create(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "demo-worn", "namespace": lab.namespace, "labels": labels},
            "spec": job,
        }
    )
    await lab.create_short()

    async def ours() -> bool:
        return any(name.startswith("demo-r001-rollout-") for name in lab.jobs.values())

    await lab.until(ours)
    left = {one["metadata"]["name"] for one in await lab.objects("batch/v1", "Job")}
    assert "demo-worn" in left, "what is not ours is not removed"
