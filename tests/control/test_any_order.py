"""Whatever happens in whatever order, a run comes to its end, by the right steps, each done once.

A small cluster behaves as Kubernetes does where it matters: Jobs are immutable and Indexed, pods come and go at any moment, deletion takes
time, and what a controller sees may be a moment old.
"""

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from dagger_operator.api import DAggerRun, EvaluationSummary, Phase, RolloutSummary, TrainingSummary, load
from dagger_operator.control import ATTEMPT, COMPONENT, RETRY, ROUND, Child, Observed, Plan, Results, StageName, Step, children, plan
from dagger_operator.store.records import Record
from dagger_operator.store.results import EvaluationResult, PreflightResult, PrepareResult, PublishResult, RolloutResult, TrainingResult

Json = dict[str, Any]
SERVERS = ("student", "teacher")


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

    # What a controller does

    def apply(self, manifest: Json) -> None:
        manifest = json.loads(json.dumps(manifest))
        key = (manifest["kind"], manifest["metadata"]["name"])
        assert len(key[1]) <= 58
        old = self.objects.get(key)
        if old is None:
            self.serial += 1
            manifest["metadata"] |= {"uid": f"uid-{self.serial}", "generation": 1}
            if key[0] == "Job":
                step = (int(manifest["metadata"]["labels"][ROUND]), manifest["metadata"]["labels"][COMPONENT])
                assert step not in self.results, f"{key[1]} is made although its stage is done"
            self.objects[key] = manifest
            return
        if key[0] == "Job":
            fixed = [{**one["spec"], "suspend": None, "activeDeadlineSeconds": None} for one in (old, manifest)]
            assert fixed[0] == fixed[1], "a Job's spec is immutable"
        changed = old["spec"] != manifest["spec"]
        manifest["metadata"] |= {"uid": old["metadata"]["uid"], "generation": old["metadata"]["generation"] + changed}
        if "deletionTimestamp" in old["metadata"]:
            manifest["metadata"]["deletionTimestamp"] = old["metadata"]["deletionTimestamp"]
        self.objects[key] = {**manifest, **({"status": old["status"]} if "status" in old else {})}

    def delete(self, kind: str, name: str, uid: str = "", *, foreground: bool = True) -> None:
        manifest = self.objects.get((kind, name))
        if manifest is None or (uid and manifest["metadata"]["uid"] != uid):
            return
        if foreground:
            manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            del self.objects[kind, name]
        for pod in self.of(manifest):
            self.terminate(pod)

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
        running = [pod for pod in self.of(job) if alive(pod)]
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


SPEC: Json = {
    "rounds": 2,
    "student": {"model": "m", "serving": {"gpus": 1}},
    "teacher": {"model": "t", "serving": {"gpus": 2}},
    "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
    "training": {"gpusPerNode": 2, "processesPerNode": 2, "retries": 1},
    "storage": {"url": "s3://b/p"},
}


def alive(pod: Json) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


class AnyOrder(RuleBasedStateMachine):
    """One run in one cluster, seen by a controller that may be late, forgetful and interrupted."""

    @initialize(
        sharing=st.sampled_from(["Dedicated", "TimeShared"]),
        student=st.sampled_from(["served", "endpoint"]),
        teacher=st.sampled_from(["served", "endpoint"]),
        evaluation=st.sampled_from(["EveryRound", "LastRound", "Disabled"]),
        overlap=st.sampled_from(["NextRound", "NextRound", "None"]),
        keep=st.sampled_from(["Logs", "Everything", "Nothing"]),
        workers=st.integers(1, 2),
        nodes=st.integers(1, 2),
    )
    def begin(self, sharing: str, student: str, teacher: str, evaluation: str, overlap: str, keep: str, workers: int, nodes: int) -> None:
        spec = copy.deepcopy(SPEC) | {"gpuSharing": sharing, "rollouts": {"workers": workers}}
        spec["evaluation"] = {"mode": evaluation, "overlap": overlap}
        spec["failurePolicy"] = {"infrastructureRetries": 2, "keep": keep}
        spec["training"]["nodes"] = nodes
        endpoint = {"url": "http://policy/v1"}
        if student == "endpoint":
            spec["student"] = {"model": "m", "endpoint": endpoint}
            spec["training"]["mode"] = "Disabled"
        if teacher == "endpoint":
            spec["teacher"] = {"model": "t", "endpoint": endpoint}
        self.run: DAggerRun = load({"metadata": {"name": "run", "uid": "u", "generation": 1}, "spec": spec})
        self.cluster = Cluster()
        self.previous = self.look()
        self.tries = 0

    # The controller

    def look(self) -> tuple[Child, ...]:
        return children(self.cluster.objects.values(), self.cluster.pods.values())

    def observe(self, *, late: bool = False, storage: bool = True) -> Observed:
        seen = self.previous if late else self.look()
        return Observed(
            now=self.cluster.clock,
            children=seen,
            results=Results(dict(self.cluster.results)),
            storage_problem=None if storage else "storage is away",
        )

    def carry_out(self, planned: Plan, share: float = 1.0, *, told: bool = True) -> None:
        actions = [lambda one=one: self.cluster.apply(one) for one in planned.objects]
        actions += [lambda one=one: self.cluster.delete(one.kind, one.name, one.uid) for one in planned.remove]
        for action in actions[: round(share * len(actions))]:
            action()
        self.previous = self.look()  # a controller sees its own writes
        if told:
            self.watch_status(planned)
            self.run = self.run.model_copy(update={"status": planned.status})

    def watch_status(self, planned: Plan) -> None:
        old, new = self.run.status, planned.status
        assert len({one.type for one in new.conditions}) == len(new.conditions)
        for one in new.conditions:
            assert one.observed_generation == self.run.metadata.generation
        if old is None:
            return
        assert new.round >= old.round
        assert new.start_time == old.start_time
        assert [one.round for one in new.rounds][: len(old.rounds)] == [one.round for one in old.rounds]
        before = {one.type: one for one in old.conditions}
        for one in new.conditions:
            if one.type in before and before[one.type].status == one.status:
                assert one.last_transition_time == before[one.type].last_transition_time

    @rule(late=st.booleans(), share=st.sampled_from([0.0, 0.4, 1.0, 1.0, 1.0]), told=st.booleans())
    def reconcile(self, late: bool, share: float, told: bool) -> None:
        observed = self.observe(late=late)
        planned = plan(self.run, observed)
        backwards = Observed(now=observed.now, children=tuple(reversed(observed.children)), results=observed.results)
        assert plan(self.run, observed) == planned == plan(self.run, backwards)
        self.carry_out(planned, share, told=told)

    @rule()
    def reconcile_while_storage_is_away(self) -> None:
        planned = plan(self.run, self.observe(storage=False))
        assert not [one for one in planned.objects if one["kind"] == "Job"]
        assert planned.status.reason == "StorageUnavailable"
        self.carry_out(planned)

    @rule(seconds=st.integers(1, 90))
    def controllers_of_the_cluster(self, seconds: int) -> None:
        self.previous = self.look()
        self.cluster.clock += timedelta(seconds=seconds)
        self.cluster.reconcile()

    # Pods

    def pick(self, draw: int, *phases: str) -> Json | None:
        pods = [pod for pod in self.cluster.pods.values() if pod["status"]["phase"] in phases]
        return pods[draw % len(pods)] if pods else None

    @rule(draw=st.integers(0, 7))
    def a_pod_starts(self, draw: int) -> None:
        if (pod := self.pick(draw, "Pending")) and "deletionTimestamp" not in pod["metadata"]:
            self.cluster.start(pod)

    @rule(draw=st.integers(0, 7))
    def a_stage_succeeds(self, draw: int) -> None:
        if (pod := self.pick(draw, "Running")) and pod["job"]:
            self.execute(pod)

    @rule(draw=st.integers(0, 7), code=st.sampled_from([1, 3, 75, 137]))
    def a_container_fails(self, draw: int, code: int) -> None:
        if pod := self.pick(draw, "Running"):
            if pod["job"]:
                self.cluster.fail(pod, code)
            else:
                said = {"exitCode": code, "message": json.dumps({"reason": "WeightsDamaged", "message": "mend it"})}
                container = {"name": "weights", "restartCount": 5, "lastState": {"terminated": said}}
                pod["status"] |= {"ready": False, "containerStatuses": [container | {"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}

    @rule(draw=st.integers(0, 7))
    def a_node_dies(self, draw: int) -> None:
        if pod := self.pick(draw, "Pending", "Running"):
            self.cluster.vanish(pod)

    @rule(draw=st.integers(0, 7))
    def no_node_has_room(self, draw: int) -> None:
        if pod := self.pick(draw, "Pending"):
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
            pod["status"]["conditions"] = [condition]

    @rule()
    def terminating_pods_are_gone(self) -> None:
        for pod in list(self.cluster.pods.values()):
            if "deletionTimestamp" in pod["metadata"]:
                self.cluster.vanish(pod)

    @rule(draw=st.integers(0, 7), foreground=st.booleans())
    def somebody_deletes_an_object(self, draw: int, foreground: bool) -> None:
        keys = sorted(self.cluster.objects)
        if keys:
            self.cluster.delete(*keys[draw % len(keys)], foreground=foreground)

    # People

    def edit(self, **spec: Any) -> None:
        document = {"metadata": self.run.metadata.wire(), "spec": self.run.spec.wire() | spec}
        edited = load(document)
        metadata = edited.metadata.model_copy(update={"generation": (self.run.metadata.generation or 0) + 1})
        self.run = self.run.model_copy(update={"spec": edited.spec, "metadata": metadata})

    @rule(suspend=st.booleans())
    def suspend_or_resume(self, suspend: bool) -> None:
        self.edit(suspend=suspend)

    @precondition(lambda self: self.run.spec.rounds < 4)
    @rule()
    def raise_rounds(self) -> None:
        self.edit(rounds=self.run.spec.rounds + 1)

    @rule(workers=st.integers(1, 3))
    def edit_what_a_stage_can_see(self, workers: int) -> None:
        self.edit(rollouts=self.run.spec.rollouts.wire() | {"workers": workers})

    @rule(limit=st.integers(1, 3))
    def edit_what_the_student_server_can_see(self, limit: int) -> None:
        if self.run.spec.student.endpoint is None:
            student = self.run.spec.student.wire()
            student["serving"]["maxModelLen"] = 1024 * limit
            self.edit(student=student)

    @rule()
    def retry(self) -> None:
        annotations = {RETRY: str(int(self.run.metadata.annotations.get(RETRY, "0")) + 1)}
        self.run = self.run.model_copy(update={"metadata": self.run.metadata.model_copy(update={"annotations": annotations})})

    # What must hold at every moment

    def execute(self, pod: Json) -> None:
        step = Step(int(pod["metadata"]["labels"][ROUND]), StageName(pod["metadata"]["labels"][COMPONENT]))
        stages = ["rollout"] if self.run.spec.training.mode == "Disabled" else ["rollout", "training", "publish"]
        needed = [(0, "prepare"), (0, "preflight"), *((number, one) for number in range(1, step.round + 1) for one in stages)]
        own = (step.round, str(step.stage))
        missing = [one for one in needed[: needed.index(own) if own in needed else None] if one not in self.cluster.results]
        assert not missing, f"{step} runs before {missing}"
        if step.stage in (StageName.ROLLOUT, StageName.PUBLISH, StageName.EVALUATION):
            made_by = step.round - 1 if step.stage is StageName.ROLLOUT else step.round
            assert pod["env"]["DAGGER_POLICY"] == Results(self.cluster.results).student_after(made_by)
        self.tries += 1
        self.cluster.succeed(pod, self.tries)

    @invariant()
    def gpus_are_held_by_one_stage_at_a_time(self) -> None:
        if not hasattr(self, "run") or self.run.spec.gpu_sharing != "TimeShared":
            return
        holding = {
            "training" if pod["metadata"]["labels"][COMPONENT] == "training" else "serving"
            for pod in self.cluster.pods.values()
            if pod["gpus"] and alive(pod)
        }
        assert len(holding) <= 1

    @invariant()
    def no_worker_name_is_taken_twice(self) -> None:
        if hasattr(self, "run"):
            labels = [(pod["metadata"]["labels"], pod["index"]) for pod in self.cluster.pods.values() if pod["job"] and alive(pod)]
            names = [(one[COMPONENT], one[ROUND], index) for one, index in labels]
            assert len(names) == len(set(names))

    @rule(moments=st.integers(1, 8))
    def all_goes_well_for_a_while(self, moments: int) -> None:
        for _ in range(moments):
            self.carry_out(plan(self.run, self.observe()))
            leaving = [pod for pod in self.cluster.pods.values() if "deletionTimestamp" in pod["metadata"]]
            self.cluster.clock += timedelta(seconds=5)
            self.cluster.reconcile()
            self.gpus_are_held_by_one_stage_at_a_time()
            self.no_worker_name_is_taken_twice()
            self.all_pods_get_on()
            for pod in leaving:
                self.cluster.vanish(pod)
        if moments >= 5 and self.run.spec.suspend:
            assert not [pod for pod in self.cluster.pods.values() if alive(pod)], "a suspended run holds nothing"

    def all_pods_get_on(self) -> None:
        owners, worked = {one["metadata"]["uid"] for one in self.cluster.objects.values()}, set()
        for pod in list(self.cluster.pods.values()):
            if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                self.cluster.start(pod)
            elif pod["status"]["phase"] == "Running" and pod["job"] and pod["owner"] not in worked:
                worked.add(pod["owner"])  # one worker at a time: the others wind up later
                self.execute(pod)
            elif not alive(pod) and pod["owner"] not in owners:
                self.cluster.vanish(pod)

    def teardown(self) -> None:
        """Failures stop: the run ends, all its steps done, and holds nothing."""
        if not hasattr(self, "run"):
            return
        self.edit(suspend=False)
        for _ in range(30 * self.run.spec.rounds + 30):
            self.all_goes_well_for_a_while(2)
            assert self.run.status is not None
            if self.run.status.phase is Phase.FAILED:
                self.retry()
            if self.run.status.phase is Phase.SUCCEEDED and not self.cluster.pods:
                break
        self.ends_well()

    def ends_well(self) -> None:
        status = self.run.status
        assert status is not None
        assert status.phase is Phase.SUCCEEDED, f"{status.phase}: {status.reason}: {[one.message for one in status.conditions]}"
        stages = ["rollout"] if self.run.spec.training.mode == "Disabled" else ["rollout", "training", "publish"]
        due = {(0, "prepare"), (0, "preflight")} | {(number, one) for number in range(1, self.run.spec.rounds + 1) for one in stages}
        assert due <= self.cluster.results.keys()
        evaluated = {number for number, one in self.cluster.results if one == "evaluation"}
        if self.run.spec.training.mode == "Enabled" and self.run.spec.evaluation.mode == "EveryRound":
            assert evaluated == set(range(1, self.run.spec.rounds + 1))
        elif self.run.spec.training.mode == "Disabled" or self.run.spec.evaluation.mode == "Disabled":
            assert not evaluated
        else:
            assert self.run.spec.rounds in evaluated
        assert not [
            key
            for key in self.cluster.objects
            if key[0] == "Deployment" and "deletionTimestamp" not in self.cluster.objects[key]["metadata"]
        ]
        again = plan(self.run, self.observe())
        assert again.objects == ()
        assert again.status == status
        assert again.events == ()
        self.run = self.run.model_copy(update={"metadata": self.run.metadata.model_copy(update={"deletion_timestamp": self.cluster.clock})})
        last = plan(self.run, self.observe())
        assert last.objects == ()
        assert len(last.remove) == len([one for one in self.cluster.objects.values() if "deletionTimestamp" not in one["metadata"]])


def explore(runs: int) -> None:
    given = settings(
        max_examples=runs,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phases.reuse, Phases.generate),  # making a long history shorter takes minutes
        print_blob=True,
    )
    run_state_machine_as_test(AnyOrder, settings=given)


def test_a_run_comes_to_its_end_whatever_happens_in_whatever_order() -> None:
    explore(20)


@pytest.mark.heavy
def test_a_run_comes_to_its_end_in_hundreds_of_orders() -> None:
    explore(300)
