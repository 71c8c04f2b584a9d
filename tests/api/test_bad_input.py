"""Bad input is answered with the field, the value and the remedy, for everything that is wrong at once."""

import json
from typing import Any

import pytest

from dagger_operator.api import InvalidRun, Problem, Tasks, load
from dagger_operator.api.run import IMMUTABLE, SPEC_BYTES, refused_edits

Json = dict[str, Any]
ELSEWHERE = "../../kube-system/secrets/admin"


def problems(document: Json) -> list[Problem]:
    with pytest.raises(InvalidRun) as refused:
        load(document)
    return list(refused.value.problems)


def test_everything_wrong_is_said_at_once(document: Json) -> None:
    spec = document["spec"]
    spec |= {"rounds": 0, "trainng": {}, "mixing": {"beta": {"type": "Constant", "value": 1.5}}}
    spec["teacher"]["serving"] = {}
    assert {str(problem) for problem in problems(document)} == {
        "spec.rounds: got 0: write a value greater than or equal to 1",
        "spec.trainng: unknown field: did you mean 'training'?",
        "spec.mixing.beta.value: got 1.5: beta is a probability: write a number in 0..1",
        "spec.teacher.endpoint: got 'both': give the teacher exactly one of serving and endpoint",
    }


def endpoint(**secret: str) -> Json:
    return {"model": "t", "endpoint": {"url": "https://x/v1", "secretRef": secret}}


@pytest.mark.parametrize(
    ("section", "given", "field", "remedy"),
    [
        ("scaffold", {"type": "Command"}, "spec.scaffold.command", "needs command"),
        ("scaffold", {"protocol": "ToolCall"}, "spec.student.serving.toolCallParser", "hermes"),
        ("sandbox", {"backend": "Pod", "allowUnconfined": True}, "spec.sandbox.allowUnconfined", "leave it out, or write backend Process"),
        ("mixing", {"strategy": "StudentPrefix"}, "spec.mixing.maxPrefixTurns", "T_max schedule"),
        ("mixing", {"beta": {"type": "Linear", "start": 1}}, "spec.mixing.beta.step", "start and step"),
        ("mixing", {"beta": {"type": "List", "values": [1, -0.5]}}, "spec.mixing.beta.values[1]", "0..1"),
        ("mixing", {"beta": {"type": "List", "values": []}}, "spec.mixing.beta.values", "at least 1 item"),
        ("training", {"steps": {"type": "Constant", "value": 0}}, "spec.training.steps.value", "1..1000000"),
        ("training", {"gpusPerNode": 4}, "spec.training.processesPerNode", "write 4"),
        ("training", {"lora": {"rank": 0}}, "spec.training.lora.rank", "greater than or equal to 1"),
        ("training", {"lora": {"rank": 513}}, "spec.training.lora.rank", "less than or equal to 512"),
        ("training", {"lora": {"targetModules": []}}, "spec.training.lora.targetModules", "at least 1 item"),
        ("training", {"lora": {"targetModules": ["all-linear"]}}, "spec.training.lora.targetModules[0]", "such as q_proj"),
        ("training", {"mode": "Sometimes"}, "spec.training.mode", "'Enabled' or 'Disabled'"),
        ("evaluation", {"initial": "yes"}, "spec.evaluation.initial", "write a valid boolean"),
        ("training", {"loss": "ForwardKL"}, "spec.labels.topLogprobs", "such as 8, or training.loss CrossEntropy"),
        ("labels", {"topLogprobs": 21}, "spec.labels.topLogprobs", "less than or equal to 20"),
        ("storage", {"url": "ftp://host/x"}, "spec.storage.url", "s3://bucket/prefix"),
        ("storage", {"url": "s3://b/p", "secretRef": {"name": ELSEWHERE}}, "spec.storage.secretRef.name", "Name of the Secret"),
        ("storage", {"url": "s3://b/p", "region": "x@thief.example/"}, "spec.storage.region", "such as eu-west-1"),
        ("storage", {"url": "s3://b/p", "region": "thief.example"}, "spec.storage.region", "such as eu-west-1"),
        ("storage", {"url": "s3://b/p", "endpointUrl": "http://within/keys?x="}, "spec.storage.endpointUrl", "without a user, a query"),
        (
            "storage",
            {"url": "s3://b/p", "endpointUrl": "http://minio..svc:9000"},
            "spec.storage.endpointUrl",
            "parts of its name have 1 to",
        ),
        ("storage", {"url": "s3://b/p", "endpointUrl": "http://.minio:9000"}, "spec.storage.endpointUrl", "parts of its name have 1 to"),
        ("storage", {"url": "s3://b/p", "endpointUrl": f"http://a.{'x' * 64}"}, "spec.storage.endpointUrl", "1 to 63 characters"),
        ("storage", {"url": "s3://b/p", "endpointUrl": "http://me@within"}, "spec.storage.endpointUrl", "without a user, a query"),
        ("student", endpoint(name=ELSEWHERE), "spec.student.endpoint.secretRef.name", "Name of the Secret"),
        ("teacher", endpoint(name=ELSEWHERE), "spec.teacher.endpoint.secretRef.name", "Name of the Secret"),
        ("teacher", endpoint(name="s", key="../k"), "spec.teacher.endpoint.secretRef.key", "Key within the Secret"),
        ("sandbox", {"namespace": "../kube-system"}, "spec.sandbox.namespace", "amespace"),
        ("teacher", {"model": "t"}, "spec.teacher.endpoint", "exactly one"),
        ("rollouts", {"pod": {"labels": {"dagger-operator.dev/run": "x"}}}, "spec.rollouts.pod.labels", "choose another name"),
        ("rollouts", {"pod": {"annotations": {"app.kubernetes.io/managed-by": "x"}}}, "spec.rollouts.pod.annotations", "choose another"),
        ("rollouts", {"pod": {"env": [{"name": "DAGGER_ROUND", "value": "2"}]}}, "spec.rollouts.pod.env[0].name", "choose another name"),
        ("training", {"pod": {"env": [{"name": "HOME", "value": "/"}]}}, "spec.training.pod.env", "choose another name"),
        ("training", {"pod": {"env": [{"name": "A"}, {"name": "A"}]}}, "spec.training.pod.env", "keep one of them"),
        ("training", {"pod": {"env": [{"name": "A-B"}]}}, "spec.training.pod.env[0].name", "does not match"),
        ("rollouts", {"pod": {"envFrom": [{}]}}, "spec.rollouts.pod.envFrom[0].secretRef", "required"),
        ("training", {"pod": {"resources": {"limits": {"memory": "much"}}}}, "spec.training.pod.resources.limits.memory", "Gi"),
        ("failurePolicy", {"rules": [{"action": "FailRun"}]}, "spec.failurePolicy.rules[0].exitCodes", "at least one"),
        ("teacher", {"model": "t", "serving": {"nodes": 2, "gpus": 0}}, "spec.teacher.serving.nodes", "or nodes 1"),
        ("kueue", {}, "spec.kueue.queueName", "required"),
        ("rounds", "3", "spec.rounds", "write a valid integer"),
        ("suspend", "yes", "spec.suspend", "write a valid boolean"),
        ("seed", 2**53, "spec.seed", "less than or equal"),
    ],
)
def test_a_problem_names_its_field_and_what_to_write(document: Json, section: str, given: object, field: str, remedy: str) -> None:
    document["spec"][section] = given
    (problem,) = problems(document)
    assert problem.field == field
    assert remedy in problem.remedy


def test_a_variable_given_twice_is_refused_as_the_api_server_refuses_it(document: Json) -> None:
    document["spec"]["student"]["serving"] = {"env": [{"name": "A"}, {"name": "A"}]}
    (problem,) = problems(document)
    assert problem.field == "spec.student.serving.env"
    assert problem.value == "got 'A'"


def test_a_student_behind_an_endpoint_is_not_trained(document: Json) -> None:
    document["spec"]["student"]["endpoint"] = {"url": "http://student/v1"}
    (problem,) = problems(document)
    assert problem.field == "spec.training.mode"
    document["spec"]["training"] = {"mode": "Disabled"}
    assert load(document).spec.student.served is None


def test_a_spec_too_large_for_an_environment_variable_is_refused_with_its_size(document: Json) -> None:
    names = ("systemTemplate", "instanceTemplate", "observationTemplate", "formatErrorTemplate")
    document["spec"]["scaffold"] = dict.fromkeys(names, "ü" * 16384)
    (problem,) = problems(document)
    assert problem.field == "spec"
    assert str(SPEC_BYTES) in problem.remedy
    document["spec"]["scaffold"] = dict.fromkeys(names, "u" * 16384)
    assert len(json.dumps(load(document).spec.wire()).encode()) < SPEC_BYTES


EDITS: dict[str, Any] = {
    "seed": 7,
    "mixing": {"beta": {"type": "Constant", "value": 0.5}},
    "student.model": "another",
    "student.endpoint.url": "http://another/v1",
    "student.endpoint.model": "another",
    "teacher.model": "another",
    "teacher.endpoint.model": "another",
    "tasks.source": {"type": "JSONL", "uri": "another"},
    "tasks.perRound": 3,
    "tasks.firstRound": 3,
    "tasks.rolloutsPerTask": 3,
    "tasks.heldOut": {"source": {"type": "JSONL", "uri": "another"}},
    "scaffold": {"maxTurns": 7},
    "training.mode": "Enabled",
    "training.lora": {"rank": 8},
    "storage.url": "s3://bucket/another",
    "managedBy": "example.org/another",
}


@pytest.mark.parametrize("immutable", IMMUTABLE, ids=lambda immutable: immutable.name)
def test_an_edit_that_would_make_finished_rounds_lie_is_refused(document: Json, immutable: Any) -> None:
    document["spec"]["student"]["endpoint"] = {"url": "http://student/v1", "model": "s"}
    document["spec"]["training"] = {"mode": "Disabled"}
    old = load(document).spec
    *path, last = immutable.name.split(".")
    place = document["spec"]
    for part in path:
        place = place.setdefault(part, {})
    place[last] = EDITS[immutable.name]
    if immutable.name == "training.mode":
        del document["spec"]["student"]["endpoint"]
    refused = refused_edits(old, load(document).spec)
    assert any(message.startswith(f"spec.{immutable.name} is immutable") and "make a new run" in message for message in refused)
    # The API server refuses by the same table: the rule compares the same path.
    assert all(f"{side}.{immutable.name}" in immutable.rule().rule for side in ("self", "oldSelf"))


def test_what_a_run_may_be_told_while_it_runs(document: Json) -> None:
    old = load(document).spec
    document["spec"] |= {
        "rounds": 9,
        "suspend": True,
        "gpuSharing": "TimeShared",
        "rollouts": {"workers": 4},
        "labels": {"concurrency": 8},
        "ttlSecondsAfterFinished": 60,
        "activeDeadlineSeconds": 3600,
        "preRunningDeadlineSeconds": 600,
        "failurePolicy": {"infrastructureRetries": 3},
        "kueue": {"queueName": "gpus"},
        "evaluation": {"mode": "LastRound", "overlap": "None"},
        "training": {"learningRate": 1e-5, "pod": {"nodeSelector": {"pool": "gpu"}}},
    }
    document["spec"]["teacher"]["endpoint"]["url"] = "https://moved.example/v1"
    document["spec"]["tasks"]["imagePrefix"] = "mirror.example/hub"
    assert refused_edits(old, load(document).spec) == []


def test_of_tasks_nothing_may_change_but_where_their_images_come_from() -> None:
    """A field that is added has to be named in the table, or here."""
    fixed = {one.name.removeprefix("tasks.") for one in IMMUTABLE if one.name.startswith("tasks.")}
    assert {field.alias for field in Tasks.model_fields.values()} - fixed == {"imagePrefix"}
