"""Whatever happens in whatever order, a run comes to its end, by the right steps, each done once.

The controller may be late, forgetful and interrupted; pods, nodes, objects and storage come and go; people edit, suspend and delete.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from dagger_operator.api import DAggerRun, Overlap, Phase, load
from dagger_operator.control import COMPONENT, RETRY, ROUND, Child, Observed, Plan, Results, StageName, Step, children, plan

Json = dict[str, Any]

SPEC: Json = {
    "rounds": 2,
    "student": {"model": "m", "serving": {"gpus": 1}},
    "teacher": {"model": "t", "serving": {"gpus": 2}},
    "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
    "training": {"gpusPerNode": 2, "processesPerNode": 2, "retries": 1},
    "storage": {"url": "s3://b/p"},
}


class AnyOrder(RuleBasedStateMachine):
    """One run in one cluster, seen by a controller that may be late, forgetful and interrupted."""

    def __init__(self, simulated: Callable[[], Any]) -> None:
        super().__init__()
        self.cluster = simulated()

    @initialize(
        sharing=st.sampled_from(["Dedicated", "TimeShared"]),
        student=st.sampled_from(["served", "endpoint"]),
        teacher=st.sampled_from(["served", "endpoint"]),
        evaluation=st.sampled_from(["EveryRound", "LastRound", "Disabled"]),
        initial=st.booleans(),
        overlap=st.sampled_from(["NextRound", "NextRound", "None"]),
        keep=st.sampled_from(["Logs", "Everything", "Nothing"]),
        slow=st.sampled_from(["evaluation", "evaluation", "rollout", "training"]),
        workers=st.integers(1, 2),
        nodes=st.integers(1, 2),
    )
    def begin(
        self,
        sharing: str,
        student: str,
        teacher: str,
        evaluation: str,
        initial: bool,
        overlap: str,
        keep: str,
        slow: str,
        workers: int,
        nodes: int,
    ) -> None:
        spec = copy.deepcopy(SPEC) | {"gpuSharing": sharing, "rollouts": {"workers": workers}}
        spec["evaluation"] = {"mode": evaluation, "overlap": overlap, "initial": initial}
        spec["failurePolicy"] = {"infrastructureRetries": 2, "keep": keep}
        spec["training"]["nodes"] = nodes
        endpoint = {"url": "http://policy/v1"}
        if student == "endpoint":
            spec["student"] = {"model": "m", "endpoint": endpoint}
            spec["training"]["mode"] = "Disabled"
        if teacher == "endpoint":
            spec["teacher"] = {"model": "t", "endpoint": endpoint}
        self.run: DAggerRun = load({"metadata": {"name": "run", "uid": "u", "generation": 1}, "spec": spec})
        self.previous = self.look()
        self.tries = 0
        self.slow, self.moments = slow, 0

    # The controller

    def look(self) -> tuple[Child, ...]:
        return children(self.cluster.objects.values(), self.cluster.pods.values(), self.cluster.clock)

    def observe(self, *, late: bool = False, storage: bool = True) -> Observed:
        seen = self.previous if late else self.look()
        return Observed(
            now=self.cluster.clock,
            children=seen,
            results=Results(dict(self.cluster.results)),
            storage_problem=None if storage else "storage is away",
        )

    def carry_out(self, planned: Plan, observed: Observed, share: float = 1.0, *, told: bool = True) -> None:
        known = {(one.kind, one.name): one.uid for one in observed.children}
        actions = [
            lambda one=one: self.cluster.apply(one, known.get((one["kind"], one["metadata"]["name"]), "")) for one in planned.objects
        ]
        actions += [lambda one=one: self.cluster.delete(one.kind, one.name, one.uid) for one in planned.remove]
        if not all(action() for action in actions[: round(share * len(actions))]):
            return  # a conflict: what was planned is given up, and the run looked at again
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
        if old.phase is Phase.SUCCEEDED and old.round >= self.run.spec.rounds:
            assert new.phase is Phase.SUCCEEDED, "what has succeeded has succeeded"
        # An edit may have rollouts wait for an evaluation beside which they began.
        waits = self.run.spec.evaluation.overlap is Overlap.NONE and (old.round, StageName.ROLLOUT) not in self.cluster.results
        # Where nothing is trained, the evaluation of round 0 may be what is left in the end.
        outlasts = self.trains_nothing() and new.round == 0
        assert outlasts or new.round >= old.round - waits
        assert new.start_time == old.start_time
        shown, before_that = ([one.round for one in status.rounds] for status in (new, old))
        assert shown == sorted(shown) and set(before_that) <= set(shown)
        before = {one.type: one for one in old.conditions}
        for one in new.conditions:
            if one.type in before and before[one.type].status == one.status:
                assert one.last_transition_time == before[one.type].last_transition_time

    def trains_nothing(self) -> bool:
        return self.run.spec.training.mode == "Disabled"

    @rule(late=st.booleans(), share=st.sampled_from([0.0, 0.4, 1.0, 1.0, 1.0]), told=st.booleans())
    def reconcile(self, late: bool, share: float, told: bool) -> None:
        observed = self.observe(late=late)
        planned = plan(self.run, observed)
        backwards = Observed(now=observed.now, children=tuple(reversed(observed.children)), results=observed.results)
        assert plan(self.run, observed) == planned == plan(self.run, backwards)
        self.carry_out(planned, observed, share, told=told)

    @rule()
    def reconcile_while_storage_is_away(self) -> None:
        observed = self.observe(storage=False)
        planned = plan(self.run, observed)
        assert not [one for one in planned.objects if one["kind"] == "Job"]
        assert planned.status.reason == ("RoundsDone" if self.is_over() else "StorageUnavailable")
        self.carry_out(planned, observed)

    def is_over(self) -> bool:
        status = self.run.status
        return status is not None and status.phase is Phase.SUCCEEDED and status.round >= self.run.spec.rounds

    @precondition(is_over)
    @rule(late=st.booleans())
    def reconcile_once_storage_was_cleared_after_the_end(self, late: bool) -> None:
        observed = replace(self.observe(late=late), results=Results())
        planned = plan(self.run, observed)
        assert planned.objects == ()
        assert planned.requeue_after is None
        self.carry_out(planned, observed)

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

    @rule(overlap=st.sampled_from(["NextRound", "None"]))
    def edit_what_may_overlap(self, overlap: str) -> None:
        self.edit(evaluation=self.run.spec.evaluation.wire() | {"overlap": overlap})

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
        stages = ["rollout"] if self.trains_nothing() else ["rollout", "training", "publish"]
        needed = [(0, "prepare"), (0, "preflight"), *((number, one) for number in range(1, step.round + 1) for one in stages)]
        own = (step.round, str(step.stage))
        missing = [one for one in needed[: needed.index(own) if own in needed else None] if one not in self.cluster.results]
        assert not missing, f"{step} runs before {missing}"
        if step.stage in (StageName.ROLLOUT, StageName.PUBLISH, StageName.EVALUATION):
            made_by = step.round - 1 if step.stage is StageName.ROLLOUT else step.round
            assert pod["env"]["DAGGER_POLICY"] == Results(self.cluster.results).student_after(made_by)
        if step.stage is StageName.EVALUATION and own not in self.cluster.results:  # with it, a worker that is late ends at once
            assert (step.round + 1, "publish") not in self.cluster.results, "another student is served by then"
        self.tries += 1
        self.cluster.succeed(pod, self.tries)

    @invariant()
    def gpus_are_held_by_one_stage_at_a_time(self) -> None:
        if not hasattr(self, "run") or self.run.spec.gpu_sharing != "TimeShared":
            return
        holding = {
            "training" if pod["metadata"]["labels"][COMPONENT] == "training" else "serving"
            for pod in self.cluster.pods.values()
            if pod["gpus"] and self.cluster.alive(pod)
        }
        assert len(holding) <= 1

    @invariant()
    def no_worker_name_is_taken_twice(self) -> None:
        if hasattr(self, "run"):
            labels = [
                (pod["metadata"]["labels"], pod["index"]) for pod in self.cluster.pods.values() if pod["job"] and self.cluster.alive(pod)
            ]
            names = [(one[COMPONENT], one[ROUND], index) for one, index in labels]
            assert len(names) == len(set(names))

    @rule(moments=st.integers(1, 8))
    def all_goes_well_for_a_while(self, moments: int) -> None:
        for _ in range(moments):
            observed = self.observe()
            self.carry_out(plan(self.run, observed), observed)
            leaving = [pod for pod in self.cluster.pods.values() if "deletionTimestamp" in pod["metadata"]]
            self.cluster.clock += timedelta(seconds=5)
            self.cluster.reconcile()
            self.gpus_are_held_by_one_stage_at_a_time()
            self.no_worker_name_is_taken_twice()
            self.all_pods_get_on()
            for pod in leaving:
                self.cluster.vanish(pod)
        if moments >= 5 and self.run.spec.suspend:
            assert not [pod for pod in self.cluster.pods.values() if self.cluster.alive(pod)], "a suspended run holds nothing"

    def all_pods_get_on(self) -> None:
        owners, worked = {one["metadata"]["uid"] for one in self.cluster.objects.values()}, set()
        self.moments += 1
        for pod in list(self.cluster.pods.values()):
            labels = pod["metadata"]["labels"]
            if labels[COMPONENT] == self.slow and (int(labels[ROUND]), self.slow) not in self.cluster.results and self.moments % 12:
                continue  # this stage takes longer than others, until it is done
            if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                self.cluster.start(pod)
            elif pod["status"]["phase"] == "Running" and pod["job"] and pod["owner"] not in worked:
                worked.add(pod["owner"])  # one worker at a time: the others wind up later
                self.execute(pod)
            elif not self.cluster.alive(pod) and pod["owner"] not in owners:
                self.cluster.vanish(pod)

    def teardown(self) -> None:
        """Failures stop: the run ends, all its steps done, and holds nothing."""
        if not hasattr(self, "run"):
            return
        self.edit(suspend=False)
        for _ in range(60 * self.run.spec.rounds + 60):
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
        stages = ["rollout"] if self.trains_nothing() else ["rollout", "training", "publish"]
        due = {(0, "prepare"), (0, "preflight")} | {(number, one) for number in range(1, self.run.spec.rounds + 1) for one in stages}
        assert due <= self.cluster.results.keys()
        evaluated = {number for number, one in self.cluster.results if one == "evaluation"}
        assert (0 in evaluated) == self.run.spec.evaluation.initial
        if self.trains_nothing() or self.run.spec.evaluation.mode == "Disabled":
            assert evaluated <= {0}
        elif self.run.spec.evaluation.mode == "EveryRound":
            assert evaluated | {0} == set(range(self.run.spec.rounds + 1))
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


def explore(simulated: Any, runs: int) -> None:
    given = settings(
        max_examples=runs,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phases.reuse, Phases.generate),  # making a long history shorter takes minutes
        print_blob=True,
    )
    run_state_machine_as_test(lambda: AnyOrder(simulated), settings=given)


def test_a_run_comes_to_its_end_whatever_happens_in_whatever_order(simulated: Any) -> None:
    explore(simulated, 20)


@pytest.mark.heavy
def test_a_run_comes_to_its_end_in_many_more_orders(simulated: Any) -> None:
    explore(simulated, 80)
