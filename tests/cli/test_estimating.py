"""`daggerctl estimate` says what a run takes before it runs, and what is wrong with the question."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.estimate import KNOWN

SAMPLES = Path(__file__).resolve().parents[2] / "manifests/samples"


@pytest.fixture
def paper() -> list[Any]:
    return list(yaml.safe_load_all((SAMPLES / "paper-qwen3-4b-dagger.yaml").read_text()))


def test_the_table_answers_what_it_takes_and_what_was_assumed(ctl: Any, paper: list[Any]) -> None:
    paper[0]["spec"]["rollouts"]["concurrency"] = 64
    answer = ctl("estimate", "run.yaml", "--gpu", "H100-80GB", documents=paper)
    assert (answer.returncode, answer.stderr) == (0, "")
    for said in (
        "8 H100-80GB at once",
        "GPU-hours",
        "round 0, the evaluation of the initial student: ",
        "teacher calls",
        "as trees",
        "optimiser",
        "KV cache",
        "ephemeral-storage",
        "utilisation 0.32",
        "beware:",
    ):
        assert said in answer.stdout


def test_json_holds_the_same_for_programs(ctl: Any, paper: list[Any]) -> None:
    answer = ctl("estimate", "run.yaml", "--gpu", "H200", "--turns", "80", "--turn-tokens", "150", "--output", "json", documents=paper)
    told = json.loads(answer.stdout)
    assert told["assumed"]["turns"] == 80 and told["fits"] and len(told["rounds"]) == 5
    assert told["rounds"][0]["labels"] == 512 * 80 and told["initialEvaluationSeconds"] > 0
    assert 0 < told["rounds"][0]["trainingGpuHours"] < told["gpuHours"]
    assert told["trainingMemory"]["total"] < told["gpu"]["memory"]
    assert told["trainingNode"]["memory"] > told["trainingNode"]["loading"] and told["teacherPod"]["disk"] > told["studentPod"]["disk"]
    assert told["studentServing"]["weights"] == 2 * KNOWN["Qwen/Qwen3-4B-Instruct-2507"].parameters


def test_what_does_not_fit_ends_as_a_failed_check(ctl: Any, paper: list[Any]) -> None:
    answer = ctl("estimate", "run.yaml", "--gpu", "H100-80GB", "--gpu-memory", "24", documents=paper)
    assert answer.returncode == 1
    assert "does not fit: training:" in answer.stdout and "write training." in answer.stdout


def test_resources_below_what_a_pod_takes_do_not_fit(ctl: Any, paper: list[Any]) -> None:
    paper[0]["spec"]["training"]["pod"]["resources"]["limits"] = {"ephemeral-storage": "20Gi"}
    answer = ctl("estimate", "run.yaml", "--gpu", "H100-80GB", documents=paper)
    assert answer.returncode == 1
    said = " ".join(answer.stdout.split())
    assert "does not fit: training.pod.resources.limits.ephemeral-storage: 20Gi: less than it takes" in said and "write 57Gi" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "Z9"), "--gpu: got 'Z9': write one of A100-40GB"),
        (("--gpu", "H100-80GB", "--turns", "0"), "--turns: got 0: write a number above 0"),
        (("--gpu", "H100-80GB", "--output", "xml"), "--output: 'xml': write table or json"),
        (("--gpu", "H100-80GB", "--gpu-memory", "-1"), "--gpu-memory: got -1.0: write a number above 0"),
        (("--gpu", "H100-80GB", "--gpu-memory", "nan"), "--gpu-memory: got nan: write a number above 0"),
        (("--gpu", "H100-80GB", "--gpu-bandwidth", "inf"), "--gpu-bandwidth: got inf: write a number above 0"),
        (("--gpu", "H100-80GB", "--utilisation", "nan"), "--utilisation: got nan: write a number above 0"),
        (("--gpu", "H100-80GB", "--command-seconds", "inf"), "--command-seconds: got inf: write 0 or more seconds"),
        (("--gpu", "H100-80GB", "--turns", "150"), "--turns: got 150: scaffold.maxTurns is 100: write at most that"),
        (("--gpu", "H100-80GB", "--end-tokens", "200000"), "--end-tokens: got 200000: student.serving.maxModelLen is 65536"),
        (("--gpu", "H100-80GB", "--config", "absent.json"), "--config: cannot be read: No such file"),
        (("--gpu", "H100-80GB", "--teacher-config", "run.yaml"), "--teacher-config: run.yaml is no JSON"),
    ],
)
def test_bad_input_is_named_with_its_remedy(ctl: Any, paper: list[Any], arguments: tuple[str, ...], said: str) -> None:
    answer = ctl("estimate", "run.yaml", *arguments, documents=paper)
    assert answer.returncode == 2
    assert said in answer.stderr and "Traceback" not in answer.stderr


def test_a_gpu_that_is_not_known_can_be_stated(ctl: Any, paper: list[Any]) -> None:
    stated = ("--gpu", "Z9", "--gpu-memory", "96", "--gpu-tflops", "500", "--gpu-bandwidth", "4")
    assert "8 Z9 at once" in ctl("estimate", "run.yaml", *stated, documents=paper).stdout


def test_a_student_that_is_not_known_is_read_from_its_folder(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    answer = ctl("estimate", "run.yaml", "--gpu", "L40S", documents=[document])
    assert answer.returncode == 2
    assert "student.model: './student' is not known here, and no folder" in answer.stderr and "--config" in answer.stderr
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 512}
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    assert ctl("estimate", "run.yaml", "--gpu", "L40S", documents=[document]).returncode == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("chat_template.jinja", "{% if enable_thinking is false %}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if enable_thinking is false %}"})),
    ],
)
def test_a_hybrid_student_is_known_by_the_chat_template_beside_its_config(
    ctl: Any, paper: list[Any], tmp_path: Path, file: str, text: str
) -> None:
    """Round 1, in which the teacher alone acts: where labels lie on the trunk, they cost nothing."""
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def tokens() -> float:
        answer = ctl("estimate", "run.yaml", "--gpu", "H100-80GB", "--config", "config.json", "--output", "json", documents=paper)
        return float(json.loads(answer.stdout)["rounds"][0]["trees"]["tokens"])

    plain = tokens()
    (tmp_path / file).write_text(text)
    assert tokens() > plain
