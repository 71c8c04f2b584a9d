"""The objects are ones that a restricted namespace of a cluster takes, and they say all that a stage needs and no more."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dagger_operator
from dagger_operator import __version__
from dagger_operator.api import DAggerRun, Role, RunSpec, load
from dagger_operator.control import Results, StageName, Step, steps
from dagger_operator.control.identity import build_identity
from dagger_operator.control.jobs import build_job, build_training_service
from dagger_operator.control.names import RUN_NAMESPACE
from dagger_operator.control.network import build_network_policy, build_training_policy
from dagger_operator.control.pods import READS, carried_run
from dagger_operator.control.servers import build_server, build_service, served
from dagger_operator.store.results import PrepareResult

Json = dict[str, Any]
Make = Callable[..., DAggerRun]
RESULTS = Results({(0, "prepare"): PrepareResult(policy="r000-base", teacher="teacher-1")})
LWS_VARIABLES = {"LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX"}
CONTAINER_FIELDS = {
    *("name", "image", "imagePullPolicy", "command", "env", "envFrom", "resources", "volumeMounts", "securityContext", "ports"),
    *("terminationMessagePolicy", "startupProbe", "livenessProbe", "readinessProbe"),
}


def manifests(run: DAggerRun) -> Iterator[Json]:
    """Every object that a run may ask for."""
    for step in steps(run.spec):
        yield build_job(run, step, RESULTS)
    for role in Role:
        if (serving := served(run, role)) is not None:
            yield build_server(run, role, serving, replicas=serving.replicas)
            yield build_service(run, role, serving)
    yield build_training_service(run)
    yield build_network_policy(run)
    yield build_training_policy(run)
    if run.spec.sandbox.namespace is not None:
        yield from build_identity(run, run.spec.sandbox.namespace)


def check_metadata(manifest: Json) -> None:
    metadata = manifest["metadata"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"].replace(".", "-"))
    assert len(metadata["name"]) <= (58 if manifest["kind"] == "Job" else 63)
    for key, text in metadata["labels"].items():
        assert re.fullmatch(r"([a-z0-9.-]+/)?[a-z0-9A-Z._-]{1,63}", key)
        assert re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?", text)
        assert len(text) <= 63
    if manifest["kind"] == "RoleBinding":  # in another namespace; the operator removes it with its run
        assert "ownerReferences" not in metadata
        assert metadata["labels"][RUN_NAMESPACE] == "default"
        return
    (owner,) = metadata["ownerReferences"]
    assert owner["controller"]
    assert owner["uid"] == "run-uid"


def check_pod(template: Json, *, restart: str | None) -> None:
    spec = template["spec"]
    assert spec.get("restartPolicy") == restart
    identity = spec.get("serviceAccountName")
    assert spec["automountServiceAccountToken"] is (identity is not None)
    assert (identity is not None) == any(one["name"] == "DAGGER_SANDBOX_NAMESPACE" for one in spec["containers"][0]["env"])
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert len(volumes) == len(spec["volumes"])
    assert all(set(one) in ({"name", "emptyDir"}, {"name", "persistentVolumeClaim"}) for one in spec["volumes"])
    containers = [*spec.get("initContainers", ()), *spec["containers"]]
    assert len({one["name"] for one in containers}) == len(containers)
    for one in containers:
        assert set(one) <= CONTAINER_FIELDS
        confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert one["securityContext"] == confined
        assert one["terminationMessagePolicy"] == "FallbackToLogsOnError"
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes.keys()
        known: set[str] = set()
        for variable in one["env"]:
            assert variable["name"] not in known
            # Kubernetes expands only what was named before.
            assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known
            known.add(variable["name"])
            assert len(variable.get("value", "")) < 128 * 1024
            assert isinstance(variable.get("value", ""), str)
        for word in one["command"]:
            assert isinstance(word, str)
            assert set(re.findall(r"\$\((\w+)\)", word)) <= known | LWS_VARIABLES


def check(manifest: Json) -> None:
    """What an API server and the restricted pod security standard would refuse."""
    assert json.loads(json.dumps(manifest)) == manifest
    check_metadata(manifest)
    spec = manifest.get("spec", {})
    match manifest["kind"]:
        case "Job":
            assert spec["completionMode"] == "Indexed"
            assert spec["parallelism"] == spec["completions"] >= 1
            assert spec["podReplacementPolicy"] == "Failed"
            assert "ttlSecondsAfterFinished" not in spec, "a failed Job that removes itself would be forgotten, and run again"
            check_pod(spec["template"], restart="Never")
            names = {one["name"] for one in spec["template"]["spec"]["containers"]}
            for one in spec["podFailurePolicy"]["rules"]:
                assert one.get("onExitCodes", {}).get("containerName", "stage") in names
        case "Deployment":
            assert spec["strategy"] == {"type": "Recreate"}
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
            check_pod(spec["template"], restart=None)
        case "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            check_pod(group["leaderTemplate"], restart=None)
            check_pod(group["workerTemplate"], restart=None)
        case "Service":
            assert spec["clusterIP"] == "None"
            assert all(spec["selector"].values())


POD: Json = {
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "low",
    "imagePullSecrets": [{"name": "registry"}],
    "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "1Gi"}},
    "labels": {"team": "a"},
    "annotations": {"example.org/note": "b"},
    "sharedMemoryMib": 1024,
    "claims": [{"claimName": "weights", "mountPath": "/models"}],
    "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "envFrom": [{"secretRef": {"name": "hub"}}],
}


@settings(max_examples=30, deadline=None)
@given(
    name=st.from_regex(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?", fullmatch=True),
    rounds=st.sampled_from([1, 12]),
    workers=st.integers(1, 1024),
    nodes=st.integers(1, 4),
    gpus=st.integers(0, 8),
    mode=st.sampled_from(["Enabled", "Disabled"]),
    teacher=st.sampled_from(
        [
            {"serving": {"gpus": 4, "toolCallParser": "qwen3_coder"}},
            {"serving": {"gpus": 8, "nodes": 2, "pod": POD}},
            {"endpoint": {"url": "http://t/v1"}},
        ]
    ),
    sandbox=st.sampled_from([{}, {"namespace": "sandboxes", "helperImage": "helper:1"}, {"namespace": "sandboxes", "backend": "Process"}]),
    kueue=st.sampled_from([{}, {"kueue": {"queueName": "gpus", "priorityClass": "low"}}]),
)
def test_whatever_the_spec_the_objects_are_admissible_and_their_names_unique(
    name: str, rounds: int, workers: int, nodes: int, gpus: int, mode: str, teacher: Json, sandbox: Json, kueue: Json
) -> None:
    spec = {
        "rounds": rounds,
        "student": {"model": "m", "serving": {"gpus": gpus}},
        "teacher": {"model": "t", **teacher},
        "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
        "rollouts": {"workers": workers, "pod": POD if workers % 2 else {}},
        "sandbox": sandbox,
        **kueue,
        "training": {"mode": mode, "nodes": nodes, "gpusPerNode": gpus, "processesPerNode": gpus or 1},
        "storage": {"url": "s3://b/p", "secretRef": {"name": "keys"}},
    }
    run = load({"metadata": {"name": name, "uid": "run-uid"}, "spec": spec})
    made = list(manifests(run))
    for manifest in made:
        check(manifest)
    keys = [(one["kind"], one["metadata"]["name"]) for one in made]
    assert len(keys) == len(set(keys))


def test_the_longest_name_leaves_room_for_a_pod_s_index(make_run: Make) -> None:
    run = make_run(rounds=1000, rollouts={"workers": 1024})
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"name": "a" * 32})})
    name = build_job(run, Step(1000, StageName.EVALUATION), RESULTS)["metadata"]["name"]
    assert len(f"{name}-1023") == 63


def environment(manifest: Json, container: str = "stage") -> Json:
    (found,) = [one for one in manifest["spec"]["template"]["spec"]["containers"] if one["name"] == container]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in found["env"]}


def test_a_rollout_worker_is_told_where_to_find_everything(make_run: Make) -> None:
    job = build_job(make_run(), Step(1, StageName.ROLLOUT), RESULTS)
    env = environment(job)
    assert env["DAGGER_ROUND"] == "1"
    assert env["DAGGER_POLICY"] == "r000-base"
    assert env["DAGGER_STUDENT_URL"] == "http://demo-student.lab.svc:8000/v1"
    assert env["DAGGER_AGENT_URL"] == "http://demo-student.lab.svc:8000"
    assert env["DAGGER_TEACHER_URL"] == "https://teacher.example/v1"
    assert env["DAGGER_TEACHER_TOKEN"] == {"secretKeyRef": {"name": "teacher-key", "key": "token"}}
    assert env["DAGGER_WORKER"] == "rollout-$(JOB_COMPLETION_INDEX)"
    assert job["spec"]["completions"] == 3
    assert job["spec"]["template"]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "storage-keys"}}]


def test_only_stages_that_ask_the_teacher_hold_its_key(make_run: Make) -> None:
    run = make_run()
    holding = {one["metadata"]["name"].split("-")[2] for one in manifests(run) if "secretKeyRef" in json.dumps(one)}
    assert holding == {"preflight", "rollout"}


def test_gpus_are_asked_for_by_training_and_servers_alone(make_run: Make) -> None:
    asking = {one["metadata"]["name"].split("-", 2)[-1][:8] for one in manifests(make_run()) if "nvidia.com/gpu" in json.dumps(one)}
    assert asking == {"training", "student"}
    on_cpu = make_run(student={"model": "m", "serving": {"gpus": 0}}, training={"gpusPerNode": 0, "processesPerNode": 2})
    assert "nvidia.com/gpu" not in json.dumps(list(manifests(on_cpu)))


def images(run: DAggerRun) -> dict[str, set[str]]:
    """Images of the project's own containers, by what they are for."""
    found: dict[str, set[str]] = {"worker": set(), "trainer": set()}
    for manifest in manifests(run):
        if manifest["kind"] in ("Job", "Deployment"):
            spec = manifest["spec"]["template"]["spec"]
            trains = "-training-" in manifest["metadata"]["name"]
            own = [one for one in (*spec.get("initContainers", ()), *spec["containers"]) if one["name"] != "vllm"]
            found["trainer" if trains else "worker"] |= {one["image"] for one in own}
    return found


def test_images_are_those_that_the_run_names_or_those_of_this_release(make_run: Make) -> None:
    release = {"worker": {f"dagger-operator/worker:{__version__}"}, "trainer": {f"dagger-operator/trainer:{__version__}"}}
    assert images(make_run()) == release
    named = {"worker": {"reg/worker:9"}, "trainer": {"reg/trainer:9"}}
    assert images(make_run(image="reg/worker:9", training={"image": "reg/trainer:9"})) == named


def test_several_training_nodes_find_the_first_by_name(make_run: Make) -> None:
    run = make_run(training={"nodes": 4})
    job = build_job(run, Step(1, StageName.TRAINING), RESULTS)
    env = environment(job)
    service = build_training_service(run)
    name = job["metadata"]["name"]
    assert env["DAGGER_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}.lab.svc"
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_a_training_pod_has_as_long_to_store_a_checkpoint_as_the_run_says(make_run: Make) -> None:
    def notice(**training: Any) -> int:
        job = build_job(make_run(training=training), Step(1, StageName.TRAINING), RESULTS)
        seconds: int = job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        return seconds

    assert (notice(), notice(terminationGracePeriodSeconds=900)) == (120, 900)


def test_the_same_inputs_make_the_same_attempt_and_a_retry_another(make_run: Make) -> None:
    step = Step(1, StageName.TRAINING)
    first, again = build_job(make_run(), step, RESULTS), build_job(make_run(), step, RESULTS)
    retried = build_job(make_run(annotations={"dagger-operator.dev/retry": "1"}), step, RESULTS)
    suspended = build_job(make_run(), step, RESULTS, suspend=True)
    assert first == again
    assert first["metadata"]["name"] == suspended["metadata"]["name"] != retried["metadata"]["name"]


def test_another_mirror_of_tasks_images_begins_nothing_anew_but_what_makes_sandboxes(make_run: Make) -> None:
    tasks = {"source": {"type": "JSONL", "uri": "t.jsonl"}, "heldOut": {"source": {"type": "JSONL", "uri": "h.jsonl"}}}
    first, moved = ({m["metadata"]["name"]: m for m in manifests(make_run(tasks=tasks | edit))} for edit in ({}, {"imagePrefix": "mirror"}))
    gone = {name.split("-", 1)[1].rpartition("-")[0] for name in first.keys() - moved.keys()}
    assert {re.sub(r"^r\d+-", "", name) for name in gone} == {"rollout", "evaluation"}
    assert all(first[name] == moved[name] for name in first.keys() & moved.keys())


@pytest.mark.parametrize("command", sorted(READS))
def test_what_a_command_is_told_is_a_valid_run_that_says_the_same(make_run: Make, command: str) -> None:
    run = make_run(training={"learningRate": 1e-5, "loss": "ForwardKL"}, labels={"topLogprobs": 4}, sandbox={"commandTimeoutSeconds": 7})
    told = load(json.loads(carried_run(run, command)))
    for section in READS[command] | (ALWAYS_READ if command != "serving" else {"tasks", "scaffold", "storage"}):
        assert getattr(told.spec, section) == getattr(run.spec, section)
    assert (told.metadata.name, told.metadata.namespace, told.metadata.uid) == ("demo", "lab", "run-uid")


ALWAYS_READ = {"seed", "mixing", "student", "teacher", "tasks", "scaffold", "storage"}
ROOMS = {
    "rollout": ("rollout", "policy", "tasks", "sandbox"),
    "training": ("training",),
    "evaluation": ("evaluation",),
    "serving": ("serving",),
}


@pytest.mark.parametrize("command", sorted(ROOMS))
def test_a_command_reads_no_section_that_its_pods_do_not_carry(command: str) -> None:
    """Otherwise it would read defaults instead of what the user wrote."""
    # Preflight is told of training what it reads: see the test below.
    allowed = ALWAYS_READ | READS[command] | (READS["preflight"] | {"training"} if command == "serving" else set())
    root = Path(dagger_operator.__file__).parent
    read = {
        (node.attr, path.name)
        for room in ROOMS[command]
        for path in (root / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in RunSpec.model_fields
        and (ast.unparse(node.value) == "spec" or ast.unparse(node.value).endswith("run.spec"))
    }
    assert {(section, file) for section, file in read if section not in allowed} == set(), "add it to READS"
    assert {section for section, _ in read} & allowed


def test_preflight_is_told_the_loss_and_begins_anew_for_nothing_else_of_training(make_run: Make) -> None:
    def told(**training: Any) -> str:
        return carried_run(make_run(training=training, labels={"topLogprobs": 4}), "preflight")

    assert load(json.loads(told(loss="ForwardKL"))).spec.training.loss == "ForwardKL"
    assert told(loss="ForwardKL") == told(loss="ForwardKL", learningRate=1e-5, batchSize=3)
    assert told() == told(learningRate=1e-5) != told(loss="ForwardKL")
