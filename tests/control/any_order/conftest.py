"""A small cluster that behaves as Kubernetes does where it matters: Jobs are immutable and Indexed, pods come and go at any moment,
deletion takes time."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from dagger_operator.api import EvaluationSummary, RolloutSummary, TrainingSummary
from dagger_operator.control import ATTEMPT, COMPONENT, ROUND, StageName, Step
from dagger_operator.store.records import Record
from dagger_operator.store.results import EvaluationResult, PreflightResult, PrepareResult, PublishResult, RolloutResult, TrainingResult

Json = dict[str, Any]


def result_of(step: Step, acting: str | None, tries: int) -> Record:
    """What a stage leaves; `tries` makes the result of every execution another one, so that a second would be seen."""
    match step.stage:
        case StageName.PREPARE:
            return PrepareResult(policy="r000-base", teacher="teacher-1")
        case StageName.PREFLIGHT:
            return PreflightResult(student="r000-base", teacher="teacher-1", checks={})
        case StageName.ROLLOUT:
            shares: Any = {"label_coverage": 1.0, "teacher_turn_share": 0.5, "teacher_token_share": 0.5}
            summary = RolloutSummary(rollouts=tries, turns=1, labels=1, data_digest="d", seconds=1.0, **shares)
            return RolloutResult(summary=summary, manifest_digest="d", excluded={})
        case StageName.TRAINING:
            version = f"r{step.round:03d}-{tries:012d}"
            return TrainingResult(
                summary=TrainingSummary(steps=1, labels=1, tokens=1, checkpoint=version, seconds=1.0), policy=version, losses=()
            )
        case StageName.PUBLISH:
            return PublishResult(policy=acting or "", replicas=1, seconds=1.0)
        case StageName.EVALUATION:
            summary_ = EvaluationSummary(
                policy=acting or "", tasks=2, resolved=1, resolved_rate=0.5, interval=[0.1, 0.9], false_submits=0, seconds=1.0
            )
            return EvaluationResult(summary=summary_, resolved_tasks=(), unresolved_tasks=())


class Cluster:
    """Objects and pods in Kubernetes' form, and the results that stages left."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.pods: dict[str, Json] = {}
        self.results: dict[tuple[int, str], Record] = {}
        self.done: dict[str, set[int]] = {}
        self.failures: dict[str, int] = {}
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)
        self.serial = 0

    @staticmethod
    def alive(pod: Json) -> bool:
        return pod["status"]["phase"] in ("Pending", "Running")

    # What a controller does

    def apply(self, manifest: Json, seen: str = "") -> bool:
        """`seen`: uid of the object as the controller knows it. Where that one is gone the API server refuses: False."""
        manifest = json.loads(json.dumps(manifest))
        key = (manifest["kind"], manifest["metadata"]["name"])
        assert len(key[1]) <= 58
        old = self.objects.get(key)
        if seen and (old is None or old["metadata"]["uid"] != seen):
            return False
        if old is None:
            self.serial += 1
            manifest["metadata"] |= {"uid": f"uid-{self.serial}", "generation": 1}
            if key[0] == "Job":
                step = (int(manifest["metadata"]["labels"][ROUND]), manifest["metadata"]["labels"][COMPONENT])
                assert step not in self.results, f"{key[1]} is made although its stage is done"
            self.objects[key] = manifest
            return True
        if key[0] == "Job":
            fixed = [{**one["spec"], "suspend": None, "activeDeadlineSeconds": None} for one in (old, manifest)]
            assert fixed[0] == fixed[1], "a Job's spec is immutable"
        changed = old["spec"] != manifest["spec"]
        manifest["metadata"] |= {"uid": old["metadata"]["uid"], "generation": old["metadata"]["generation"] + changed}
        if "deletionTimestamp" in old["metadata"]:
            manifest["metadata"]["deletionTimestamp"] = old["metadata"]["deletionTimestamp"]
        self.objects[key] = {**manifest, **({"status": old["status"]} if "status" in old else {})}
        return True

    def delete(self, kind: str, name: str, uid: str = "", *, foreground: bool = True) -> bool:
        manifest = self.objects.get((kind, name))
        if manifest is None or (uid and manifest["metadata"]["uid"] != uid):
            return True  # it is gone, as was wanted
        if foreground:
            manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del self.objects[kind, name]
        for pod in self.of(manifest):
            self.terminate(pod)
        return True

    # What the cluster's own controllers do, one step at a time

    def of(self, manifest: Json) -> list[Json]:
        return [pod for pod in self.pods.values() if pod["owner"] == manifest["metadata"]["uid"]]

    def terminate(self, pod: Json) -> None:
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    def reconcile(self) -> None:
        for key, manifest in list(self.objects.items()):
            if "deletionTimestamp" in manifest["metadata"]:
                for pod in self.of(manifest):
                    self.terminate(pod)
                if not self.of(manifest):
                    del self.objects[key]
            elif key[0] == "Job":
                self.reconcile_job(manifest)
            elif key[0] == "Deployment":
                self.reconcile_deployment(manifest)

    def reconcile_job(self, job: Json) -> None:
        status, spec, uid = job.setdefault("status", {}), job["spec"], job["metadata"]["uid"]
        running = [pod for pod in self.of(job) if self.alive(pod)]
        if status.get("conditions"):
            for pod in running:
                self.terminate(pod)
            return
        over = [pod for pod in self.of(job) if pod["status"].get("code") == 3]
        done = self.done.setdefault(uid, set())
        if over or self.failures.get(uid, 0) > spec["backoffLimit"]:
            reason = "PodFailurePolicy" if over else "BackoffLimitExceeded"
            status["conditions"] = [{"type": "Failed", "status": "True", "reason": reason, "lastTransitionTime": self.time()}]
        elif len(done) == spec["completions"]:
            status["conditions"] = [{"type": "Complete", "status": "True", "lastTransitionTime": self.time()}]
        elif spec.get("suspend"):
            for pod in running:
                self.terminate(pod)
        else:
            for index in range(spec["completions"]):
                if index not in done and not any(pod["index"] == index for pod in running):
                    self.create(job, index)

    def reconcile_deployment(self, deployment: Json) -> None:
        template, replicas = deployment["spec"]["template"], deployment["spec"]["replicas"]
        attempt = template["metadata"]["labels"][ATTEMPT]
        mine = self.of(deployment)
        current = [pod for pod in mine if pod["metadata"]["labels"][ATTEMPT] == attempt]
        for pod in mine:
            if pod not in current or current.index(pod) >= replicas:
                self.terminate(pod)
        if len(current) == len(mine):  # Recreate: nothing new before the old is gone
            for index in range(len(current), replicas):
                self.create(deployment, index)
        mine = self.of(deployment)
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": len(mine),
            "updatedReplicas": len([pod for pod in mine if pod["metadata"]["labels"][ATTEMPT] == attempt]),
            "readyReplicas": len([pod for pod in mine if pod["status"].get("ready")]),
        }

    def create(self, owner: Json, index: int) -> None:
        self.serial += 1
        template = owner["spec"]["template"]
        env = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
        limits = [one.get("resources", {}).get("limits", {}) for one in template["spec"]["containers"]]
        pod = {
            "kind": "Pod",
            "metadata": {"name": f"{owner['metadata']['name']}-{index}-{self.serial}", "labels": template["metadata"]["labels"]},
            "status": {"phase": "Pending"},
            "owner": owner["metadata"]["uid"],
            "job": owner["kind"] == "Job",
            "index": index,
            "env": env,
            "gpus": sum(int(one.get("nvidia.com/gpu", 0)) for one in limits),
        }
        self.pods[pod["metadata"]["name"]] = pod

    def time(self) -> str:
        return self.clock.strftime("%Y-%m-%dT%H:%M:%SZ")

    # What happens to pods

    def start(self, pod: Json) -> None:
        pod["status"] = {"phase": "Running", "containerStatuses": [{"name": "stage", "state": {"running": {}}}], "ready": not pod["job"]}

    def succeed(self, pod: Json, tries: int) -> None:
        """A stage does its work, unless another worker did it before, and ends."""
        step = Step(int(pod["metadata"]["labels"][ROUND]), StageName(pod["metadata"]["labels"][COMPONENT]))
        self.results.setdefault((step.round, step.stage), result_of(step, pod["env"].get("DAGGER_POLICY"), tries))
        self.done.setdefault(pod["owner"], set()).add(pod["index"])
        self.end(pod, 0, "")

    def fail(self, pod: Json, code: int) -> None:
        if code != 75:  # `Ignore` in the Job's podFailurePolicy
            self.failures[pod["owner"]] = self.failures.get(pod["owner"], 0) + 1
        self.end(pod, code, json.dumps({"reason": "Broken", "message": f"exit {code}: mend it"}))

    def end(self, pod: Json, code: int, message: str) -> None:
        ended = {"exitCode": code, "message": message, "finishedAt": self.time()}
        pod["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "code": code,
            "containerStatuses": [{"name": "stage", "state": {"terminated": ended}}],
        }

    def vanish(self, pod: Json) -> None:
        """Gone: the end of a termination, or its node died."""
        self.pods.pop(pod["metadata"]["name"], None)


@pytest.fixture
def simulated() -> type[Cluster]:
    """The class: each history begins with a cluster of its own."""
    return Cluster
