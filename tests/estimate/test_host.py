"""Host memory and disk of the pods that hold GPUs: by part, as the trainer and the servers use them, and held against `resources`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.api import Resources, Training, load
from dagger_operator.estimate import GIB, GPUS, KNOWN, Assumptions, Estimate, estimate
from dagger_operator.estimate.host import OTHER, PROCESS, TrainingNode, amount, is_folder, too_little, training_node, whole_gib
from dagger_operator.estimate.memory import Setup, training_memory

SAMPLES = [path for path in sorted((Path(__file__).resolve().parents[2] / "manifests/samples").glob("*.yaml")) if "gpu" in path.read_text()]
FOUR = KNOWN["Qwen/Qwen3-4B-Instruct-2507"]
N = FOUR.parameters


def _run(name: str) -> dict[str, Any]:
    text = next(path for path in SAMPLES if path.stem == name).read_text()
    return next(one for one in yaml.safe_load_all(text) if one["kind"] == "DAggerRun")


def _node(label_tokens: float = 0.0, **training: Any) -> TrainingNode:
    given = Training.model_validate({"processesPerNode": 8, "gpusPerNode": 8, **training})
    return training_node(FOUR, given, training_memory(FOUR, Setup.of(given)), label_tokens)


def _estimate(document: dict[str, Any]) -> Estimate:
    spec = load(document).spec
    return estimate(spec, GPUS["H100-80GB"], KNOWN[spec.student.model], KNOWN.get(spec.teacher.model), Assumptions.of(spec))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_every_sample_with_gpus_asks_for_what_its_pods_take_and_for_little_more(path: Path) -> None:
    document = _run(path.stem)
    found, spec = _estimate(document), load(document).spec
    assert not [finding for finding in found.findings if "resources" in finding.field]
    pods = {
        "training": (spec.training.pod, found.training_node),
        "student": (spec.student.served and spec.student.served.pod, found.student_pod),
    }
    pods["teacher"] = (spec.teacher.serving and spec.teacher.serving.pod, found.teacher_pod)
    for settings, need in pods.values():
        if settings is not None and need is not None:
            for name, size in (("memory", need.memory), ("ephemeral-storage", need.disk)):
                assert size <= amount(settings.resources.requests[name]) <= 1.4 * size


def test_every_rank_loads_the_weights_whole_and_holds_all_labels() -> None:
    node = _node(label_tokens=1e9, deepspeed={"zeroStage": 3})
    assert (node.processes, node.labels, node.loading) == (8 * PROCESS, 8 * 4e9, 8 * 2 * N)
    assert node.memory == node.processes + node.labels + node.loading
    assert _node(deepspeed={"zeroStage": 3}, precision="FP32").loading == _node(deepspeed={"zeroStage": 0}).loading == 8 * 4 * N
    assert _node(label_tokens=1e10).memory == 8 * PROCESS + 2 * 8 * 4e10, "once more while ranks exchange them"


def test_an_offloaded_optimiser_is_there_when_weights_are_gathered() -> None:
    node = _node(deepspeed={"zeroStage": 2, "offload": "Optimizer"})
    assert node.offloaded == pytest.approx(16 * N)
    assert node.memory == pytest.approx(8 * PROCESS + 16 * N + 6 * N)


def test_a_checkpoint_is_dealt_to_nodes_and_each_reads_the_first_nodes_files_too() -> None:
    one, four = (_node(deepspeed={"zeroStage": 3}, nodes=nodes) for nodes in (1, 4))
    assert (one.checkpoint, four.checkpoint) == (12 * N, 2 * 12 * N / 4)
    assert one.disk == 2 * N + 12 * N + OTHER
    assert one.disk_cut_anew == four.disk_cut_anew == 2 * N + 3 * 12 * N + OTHER
    assert _node(deepspeed={"zeroStage": 2}).checkpoint == 14 * N, "the first rank writes the weights too"
    assert _node(deepspeed={"zeroStage": 0}, nodes=4).checkpoint == 12 * N, "every rank has all of it"


def test_of_adapters_alone_there_are_checkpoints() -> None:
    node, adapters = _node(lora={}, deepspeed={"zeroStage": 3}), FOUR.adapters(16)
    assert (node.checkpoint, node.export, node.loading) == (12 * adapters, 2 * N + 4 * adapters, 8 * 2 * N)


def test_labels_of_all_rounds_are_held_where_they_are_trained_on() -> None:
    document = _run("paper-qwen3-4b-dagger")
    current = _estimate(document).training_node
    document["spec"]["training"]["aggregation"] = "AllRoundsFromBase"
    every = _estimate(document).training_node
    assert current is not None and every is not None
    assert every.labels == pytest.approx(5 * current.labels)


def test_a_student_is_there_twice_and_a_teacher_on_a_claim_not_at_all() -> None:
    document = _run("paper-qwen3-4b-dagger")
    found = _estimate(document)
    assert found.student_pod is not None and found.teacher_pod is not None
    assert found.student_pod.weights == 2 * 2 * N
    assert found.teacher_pod.weights == 2 * KNOWN["Qwen/Qwen3-Coder-30B-A3B-Instruct"].parameters
    assert [is_folder(model) for model in ("/models/teacher", "./teacher", "s3://bucket/run/teacher", "org/name")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_limit_below_does_not_fit_and_a_request_below_is_pointed_out_with_what_to_write() -> None:
    node = replace(_node(deepspeed={"zeroStage": 3}), loading=100 * GIB)
    given = Resources(requests={"memory": "64Gi", "ephemeral-storage": "1Ti"}, limits={"memory": "100G", "cpu": "8"})
    found = {finding.field: finding for finding in too_little("training.pod.resources", given, node)}
    assert {field: finding.fatal for field, finding in found.items()} == {
        "training.pod.resources.requests.memory": False,
        "training.pod.resources.limits.memory": True,
    }
    assert found["training.pod.resources.limits.memory"].remedy == "write 132Gi"
    assert not list(too_little("x", Resources(requests={"memory": "132Gi"}), node))
    assert not list(too_little("x", Resources(), node))


def test_quantities_are_read_and_written_as_kubernetes_does() -> None:
    assert [amount(text) for text in ("1500", "1.5Gi", "2G", "500m", "1k")] == [1500, 1.5 * GIB, 2e9, 0.5, 1000]
    assert whole_gib(GIB) == "1Gi" and whole_gib(GIB + 1) == "2Gi"
