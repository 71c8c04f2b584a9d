"""A real API server takes the CRD and refuses what the models refuse: with the field and what to write instead, before anything runs."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = sorted((ROOT / "manifests" / "samples").rglob("*.yaml"))
Json = dict[str, Any]
Say = Callable[..., str]


@pytest.fixture(scope="module")
def dry(control_plane: Any) -> Iterator[Say]:
    """What the API server would answer to `kubectl create`: nothing is kept, so that one namespace serves all tests."""
    with control_plane.fresh_namespace() as namespace:
        yield answers(control_plane, namespace, "create", "--dry-run=server")


@pytest.fixture
def said(control_plane: Any, namespace: str) -> Say:
    """What the API server answers to `kubectl create`, or another verb."""
    return answers(control_plane, namespace, "create")


def answers(control_plane: Any, namespace: str, *usually: str) -> Say:
    def ask(document: Json, *command: str) -> str:
        verb, *flags = command or usually
        text = json.dumps(document)
        try:
            answer: str = control_plane.kubectl(verb, f"--namespace={namespace}", "-f", "-", *flags, input=text)
        except RuntimeError as refused:
            return str(refused)
        return answer

    return ask


def run_of(path: Path) -> list[Json]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one and one["kind"] == "DAggerRun"]


def endpoint(**secret: str) -> Json:
    return {"model": "t", "endpoint": {"url": "https://x/v1", "secretRef": secret}}


@pytest.mark.parametrize("path", [path for path in SAMPLES if run_of(path)], ids=lambda path: path.stem)
def test_every_sample_is_accepted(dry: Say, path: Path) -> None:
    for run in run_of(path):
        run["metadata"].pop("namespace", None)
        assert "created" in dry(run)


@pytest.mark.parametrize(
    ("section", "given", "field", "remedy"),
    [
        # Rules: two fields that do not fit together, or more than a schema can say.
        ("scaffold", {"type": "Command"}, "spec.scaffold", "needs command"),
        ("scaffold", {"protocol": "ToolCall"}, "spec", "hermes"),
        ("sandbox", {"backend": "Pod", "allowUnconfined": True}, "spec.sandbox", "leave it out, or write backend Process"),
        ("mixing", {"strategy": "StudentPrefix"}, "spec.mixing", "T_max schedule"),
        ("mixing", {"beta": {"type": "Linear", "start": 1}}, "spec.mixing.beta", "start and step"),
        ("mixing", {"beta": {"type": "Constant", "value": 1.5}}, "spec.mixing", "0..1"),
        ("mixing", {"beta": {"type": "List", "values": [1, -0.5]}}, "spec.mixing", "0..1"),
        ("training", {"steps": {"type": "Constant", "value": 0}}, "spec.training", "1..1000000"),
        ("training", {"gpusPerNode": 4}, "spec.training", "the same number"),
        ("training", {"loss": "ForwardKL"}, "spec", "write labels.topLogprobs"),
        ("teacher", {"model": "t"}, "spec.teacher", "exactly one"),
        ("teacher", {"model": "t", "serving": {}, "endpoint": {"url": "http://x/v1"}}, "spec.teacher", "exactly one"),
        ("teacher", {"model": "t", "serving": {"nodes": 2, "gpus": 0}}, "spec.teacher.serving", "or nodes 1"),
        ("rollouts", {"pod": {"labels": {"dagger-operator.dev/run": "x"}}}, "spec.rollouts.pod", "choose another name"),
        ("rollouts", {"pod": {"env": [{"name": "DAGGER_ROUND"}]}}, "spec.rollouts.pod.env[0]", "choose another name"),
        ("training", {"pod": {"env": [{"name": "HOME"}]}}, "spec.training.pod", "choose another name"),
        ("failurePolicy", {"rules": [{"action": "FailRun"}]}, "spec.failurePolicy.rules[0]", "at least one"),
        # The schema: one field by itself.
        ("mixing", {"beta": {"type": "List", "values": []}}, "spec.mixing.beta.values", "at least 1 item"),
        ("training", {"mode": "Sometimes"}, "spec.training.mode", '"Enabled", "Disabled"'),
        ("storage", {"url": "ftp://host/x"}, "spec.storage.url", "s3"),
        ("storage", {"url": "s3://b/p", "secretRef": {"name": "../../x/secrets/y"}}, "spec.storage.secretRef.name", "should match"),
        ("storage", {"url": "s3://b/p", "region": "x@thief.example/"}, "spec.storage.region", "should match"),
        ("teacher", endpoint(name="../x"), "spec.teacher.endpoint.secretRef.name", "should match"),
        ("teacher", endpoint(name="x", key="../y"), "spec.teacher.endpoint.secretRef.key", "should match"),
        ("kueue", {}, "spec.kueue.queueName", "Required"),
        ("rounds", 0, "spec.rounds", "greater than or equal to 1"),
        ("rounds", "3", "spec.rounds", "integer"),
        ("suspend", "yes", "spec.suspend", "boolean"),
        ("seed", 2**53, "spec.seed", "less than or equal"),
        ("trainng", {}, "spec.trainng", "unknown field"),
    ],
)
def test_what_is_wrong_is_refused_with_its_field_and_what_to_write(
    dry: Say, document: Json, section: str, given: object, field: str, remedy: str
) -> None:
    document["spec"][section] = given
    answer = dry(document)
    assert field in answer
    assert remedy in answer
    assert "created" not in answer


@pytest.mark.parametrize("name", ["run-", "r" * 33, "run.a", "1run"])
def test_a_name_that_cannot_be_part_of_a_host_name_is_refused(dry: Say, document: Json, name: str) -> None:
    document["metadata"]["name"] = name
    answer = dry(document)
    assert "Invalid value" in answer
    assert "name" in answer


def test_a_spec_of_a_megabyte_is_refused(said: Say, document: Json) -> None:
    document["spec"]["scaffold"] = {"systemTemplate": "x" * 2**20}
    assert "spec.scaffold.systemTemplate" in said(document)


def test_an_edit_that_would_make_finished_rounds_lie_is_refused_and_others_are_not(said: Say, document: Json) -> None:
    assert "created" in said(document)
    edits: Json = {
        "seed": 7,
        "mixing": {"beta": {"type": "Constant", "value": 0.5}},
        "student.model": "another",
        "teacher.model": "another",
        "teacher.endpoint.model": "another",
        "tasks.source": {"type": "JSONL", "uri": "another"},
        "tasks.perRound": 3,
        "tasks.firstRound": 3,
        "tasks.rolloutsPerTask": 3,
        "tasks.heldOut": {"source": {"type": "JSONL", "uri": "another"}},
        "scaffold": {"maxTurns": 7},
        "training.mode": "Disabled",
        "training.lora": {},
        "storage.url": "s3://bucket/another",
        "managedBy": "example.org/another",
    }
    for field, value in edits.items():
        edited = copy.deepcopy(document)
        *path, last = field.split(".")
        place = edited["spec"]
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
        answer = said(edited, "apply", "--server-side", "--force-conflicts")
        assert f"{field} is immutable" in answer
        assert "make a new run" in answer

    document["spec"] |= {"rounds": 9, "suspend": True, "rollouts": {"workers": 4}, "training": {"learningRate": 1e-5}}
    document["spec"]["tasks"]["imagePrefix"] = "mirror.example/hub"
    assert "serverside-applied" in said(document, "apply", "--server-side", "--force-conflicts")


def test_the_status_is_written_by_its_own_door_alone(said: Say, document: Json, control_plane: Any, namespace: str) -> None:
    said({**document, "status": {"phase": "Succeeded"}})
    patch = ("patch", "daggerrun", "run", f"--namespace={namespace}", "--type=merge")
    control_plane.kubectl(*patch, "-p", json.dumps({"status": {"phase": "Failed"}}))
    read = ("get", "daggerrun", "run", f"--namespace={namespace}", "-o", "jsonpath={.status.phase}")
    assert control_plane.kubectl(*read) == ""
    control_plane.kubectl(*patch, "--subresource=status", "-p", json.dumps({"status": {"phase": "Rollout"}, "spec": {"rounds": 2}}))
    assert control_plane.kubectl(*read) == "Rollout"
    assert control_plane.kubectl(*read[:-1], "jsonpath={.spec.rounds}") == "5"
