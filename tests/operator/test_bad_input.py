"""What is wrong with a run is in its status, with field, value and remedy, as early as anybody can know it."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.kube.errors import ApiError

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Json = dict[str, Any]
ENDPOINT = {"url": "https://teacher.example/v1"}


def message(run: Json, kind: str = "Progressing") -> str:
    return str(next(one["message"] for one in run["status"]["conditions"] if one["type"] == kind))


async def until_pod(lab: Any, component: str, run: str = "demo") -> Json:
    async def there() -> Json | None:
        wanted = {"dagger-operator.dev/component": component, "dagger-operator.dev/run": run}
        return next((pod for pod in await lab.objects("v1", "Pod") if wanted.items() <= pod["metadata"]["labels"].items()), None)

    found: Json = await lab.until(there)
    return found


def held(reason: str, said: str) -> Json:
    waiting = {"name": "stage", "image": "i", "imageID": "", "restartCount": 0, "ready": False}
    return {"containerStatuses": [{**waiting, "state": {"waiting": {"reason": reason, "message": said}}}]}


NOWHERE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu"}


WAITS: dict[str, tuple[Json, list[str]]] = {
    "ErrImagePull": (held("ErrImagePull", 'image "reg/worker:9": not found'), ["spec.image", "reg/worker:9", "imagePullSecrets"]),
    "CreateContainerConfigError": (held("CreateContainerConfigError", 'secret "key" not found'), ['"key"', "secretRef", "create it"]),
    "Unschedulable": ({"conditions": [NOWHERE], "containerStatuses": []}, ["nvidia.com/gpu", "spec.rollouts.pod.resources"]),
}


async def test_what_a_pod_does_not_get_is_in_the_status_and_an_edit_that_would_lie_is_refused_meanwhile(lab: Any, operator: Any) -> None:
    lab.paused = {"prepare"}
    await lab.create_short()
    for reason, (status, parts) in WAITS.items():
        await lab._set(await until_pod(lab, "prepare"), status)
        said = message(await lab.until_reason(reason))
        assert [part for part in parts if part not in said] == [], said
    for edit, field in (({"seed": 9}, "seed"), ({"teacher": {"model": "u", "endpoint": ENDPOINT}}, "teacher.model")):
        with pytest.raises(ApiError, match=rf"{field} is immutable, .*: make a new run with a new name"):
            await lab.edit(**edit)
    lab.paused = set()
    await lab.until_phase("Succeeded")
    assert len([name for name in lab.jobs.values() if "-prepare-" in name]) == 1


async def executed(lab: Any, pod: Json, folder: Path) -> None:
    """What a kubelet does with a stage: its command, and its last words in the pod's status."""
    (container,) = pod["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    log = folder / pod["metadata"]["name"]
    environ = {**os.environ, **given, "DAGGER_SCRATCH": str(folder), "DAGGER_TERMINATION_LOG": str(log)}
    process = await asyncio.create_subprocess_exec(sys.executable, *container["command"][1:], env=environ)
    ended = {"exitCode": await process.wait(), "reason": "Error", "message": log.read_text(), "finishedAt": "2026-01-01T00:00:00Z"}
    stage = {"name": "stage", "image": "i", "imageID": "", "restartCount": 0, "ready": False, "state": {"terminated": ended}}
    await lab._set(pod, {"phase": "Failed", "containerStatuses": [stage]})


@pytest.mark.parametrize(
    ("spec", "reason", "parts"),
    [
        ({}, "PrefixTaken", ["belongs to run {namespace}/first", "set storage.url to a prefix of its own"]),
        ({"student": {"model": "/models/none", "serving": {"gpus": 0}}}, "ModelNotFound", ["student.model", "/models/none", "correct it"]),
    ],
    ids=["two runs on one prefix", "a model that does not exist"],
)
async def test_what_prepare_finds_ends_the_run_before_anything_is_served(
    lab: Any, operator: Any, tmp_path: Path, spec: Json, reason: str, parts: list[str]
) -> None:
    if reason == "PrefixTaken":
        await lab.create_short("first")
        await lab.until_phase("Succeeded", "first")
        spec = {**spec, "storage": lab.document("first")["spec"]["storage"], "student": {"model": "m", "serving": {"gpus": 0}}}
    lab.paused = {"prepare"}
    await lab.create(**spec)
    await executed(lab, await until_pod(lab, "prepare"), tmp_path)
    run = await lab.until_phase("Failed")
    assert run["status"]["reason"] == reason
    said = message(run, "Failed")
    assert [part for part in parts if part.format(namespace=lab.namespace) not in said] == [], said
    assert await lab.objects("apps/v1", "Deployment") == []


async def test_a_megabyte_of_templates_is_refused_before_it_is_stored(lab: Any, operator: Any) -> None:
    document = lab.document("large", scaffold={"systemTemplate": "x" * 10**6})
    with pytest.raises(ApiError, match=r"spec\.scaffold\.systemTemplate"):
        await lab.client.create(document)
    names = ("systemTemplate", "instanceTemplate", "observationTemplate", "formatErrorTemplate")
    await lab.create("large", scaffold=dict.fromkeys(names, "\u00fc" * 16384))
    run = await lab.until_reason("InvalidSpec", "large")
    said = message(run, "Accepted")
    assert "bytes as JSON" in said and "shorten templates" in said
    assert await lab.objects("batch/v1", "Job") == []
    assert len(json.dumps(run["status"])) < 4096
