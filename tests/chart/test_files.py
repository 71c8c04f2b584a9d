"""The chart's and the manifests' files belong together, and every sample is a valid run."""

import json
import re
import runpy
import ssl
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from email.message import Message
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import yaml
from annotated_types import Le
from jsonschema import Draft7Validator
from pydantic import BaseModel
from typer.testing import CliRunner

from dagger_operator.api import Aggregation, BatchUnit, DAggerRun, MixingStrategy, Rollouts, Sandbox, load
from dagger_operator.cli.app import app
from dagger_operator.estimate import KNOWN
from dagger_operator.rollout.sandboxes import lifetime_seconds
from dagger_operator.training.template import template_options

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
SAMPLES = sorted((ROOT / "manifests" / "samples").rglob("*.yaml"))
Json = dict[str, Any]

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def resolved(node: Json) -> Json:
    return SCHEMA["definitions"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node


def test_the_charts_crd_is_the_one_that_the_models_make() -> None:
    copied = (CHART / "files" / "daggerruns.yaml").read_text()
    assert copied == (ROOT / "manifests" / "crd" / "daggerruns.yaml").read_text(), "run `make generate`"


def test_chart_operator_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart["version"] == chart["appVersion"] == version


def test_the_values_are_those_of_the_schema_and_no_others() -> None:
    Draft7Validator.check_schema(SCHEMA)
    Draft7Validator(SCHEMA).validate(VALUES)

    def same_names(values: Json, schema: Json, path: str) -> None:
        schema = resolved(schema)
        if "properties" not in schema:
            return
        assert schema["additionalProperties"] is False, path
        assert set(values) == set(schema["properties"]) - {"global"}, path
        for name, inner in values.items():
            same_names(inner, schema["properties"][name], f"{path}.{name}")

    same_names(VALUES, SCHEMA, "values")


def test_every_value_is_explained() -> None:
    lines = [line.strip() for line in (CHART / "values.yaml").read_text().splitlines()]
    explained = [below.split(":")[0] for above, below in pairwise(lines) if above.startswith("# --")]

    def leaves(values: Json) -> Iterator[str]:
        for name, inner in values.items():
            if isinstance(inner, dict) and inner and name != "resources":
                yield from leaves(inner)
            else:
                yield name

    assert explained == list(leaves(VALUES))


@pytest.fixture
def helm_test(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], Any]], None]:
    """Runs what `helm test` runs, in no time, where requests for a URL are answered so."""
    now = count()
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    monkeypatch.setattr(time, "sleep", lambda seconds: [next(now) for _ in range(seconds)])
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: None)
    monkeypatch.setattr(Path, "read_text", lambda _: "token")
    monkeypatch.setattr(sys, "argv", ["check.py", "operator.dagger-system.svc:8081", "lab"])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")

    def test(answer: Callable[[str], Any]) -> None:
        monkeypatch.setattr(urllib.request, "urlopen", lambda request, **_: answer(request.full_url))
        runpy.run_path(str(CHART / "files" / "check.py"))

    return test


WELL = nullcontext(SimpleNamespace(status=200))
READY = "http://operator.dagger-system.svc:8081/readyz"


@pytest.mark.parametrize(("host", "server"), [("10.96.0.1", "https://10.96.0.1:443"), ("fd00:10:96::1", "https://[fd00:10:96::1]:443")])
def test_helm_test_finds_the_api_server_of_every_family(monkeypatch: pytest.MonkeyPatch, helm_test: Any, host: str, server: str) -> None:
    asked: list[str] = []

    def answer(url: str) -> Any:
        asked.append(url)
        return WELL

    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    helm_test(answer)
    assert asked == [READY, f"{server}/apis/dagger-operator.dev/v1alpha1/namespaces/lab/daggerruns?limit=1"]


def test_helm_test_waits_for_an_operator_that_is_starting(helm_test: Any, capsys: pytest.CaptureFixture[str]) -> None:
    starting = [URLError("connection refused"), HTTPError(READY, 503, "Service Unavailable", Message(), None)] * 10

    def answer(url: str) -> Any:
        if url == READY and starting:
            raise starting.pop()
        return WELL

    helm_test(answer)
    assert not starting
    told = capsys.readouterr().out
    assert "waiting for the operator to become ready" in told and "connection refused" in told and "503" in told


def test_helm_test_fails_where_the_operator_does_not_become_ready_and_says_so(helm_test: Any) -> None:
    tries: list[str] = []

    def answer(url: str) -> Any:
        tries.append(url)
        raise URLError("connection refused")

    with pytest.raises(SystemExit, match=r"readyz is not ready after 120 s: .*connection refused.*operator's pods"):
        helm_test(answer)
    assert set(tries) == {READY}


def test_a_sandbox_may_live_for_as_long_as_a_run_can_ask_and_no_longer() -> None:
    def most(model: type[BaseModel], field: str) -> int:
        return next(int(str(bound.le)) for bound in model.model_fields[field].metadata if isinstance(bound, Le))

    asked = lifetime_seconds(
        Sandbox(
            create_timeout_seconds=most(Sandbox, "create_timeout_seconds"), grade_timeout_seconds=most(Sandbox, "grade_timeout_seconds")
        ),
        Rollouts(timeout_seconds=most(Rollouts, "timeout_seconds")),
    )
    policy = (CHART / "templates" / "admission" / "sandbox-pods.yaml").read_text()
    assert f"object.spec.activeDeadlineSeconds <= {asked}\n" in policy and f"to {asked} at most" in policy


def runs(path: Path) -> list[DAggerRun]:
    return [load(one) for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "DAggerRun"]


@pytest.mark.parametrize("path", [path for path in SAMPLES if "DAggerRun" in path.read_text()], ids=lambda path: path.stem)
def test_daggerctl_accepts_every_sample(path: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(path)])
    assert done.exit_code == 0, done.output


def test_samples_do_not_meet_in_names_or_storage() -> None:
    found = [run for path in SAMPLES for run in runs(path)]
    assert len({run.metadata.name for run in found}) == len({run.spec.storage.url for run in found}) == len(found) >= 6


PAPER = [path for path in SAMPLES if path.name.startswith("paper-")]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_numbers_are_in_the_papers_samples(path: Path) -> None:
    (run,) = runs(path)
    spec, small = run.spec, "4b" in path.stem
    assert spec.rounds == 5 and spec.tasks.per_round == 512 and spec.tasks.source.split == "train[:2338]"
    assert spec.student.model == ("Qwen/Qwen3-4B-Instruct-2507" if small else "Qwen/Qwen3-8B")
    assert spec.teacher.model == "Qwen/Qwen3-Coder-30B-A3B-Instruct"
    for policy in (spec.student, spec.teacher):
        assert (policy.sampling.temperature, policy.sampling.top_p) == (0.7, 0.9)
    training = spec.training
    assert (training.learning_rate, training.batch_size, training.batch_unit, training.epochs) == (3e-6, 16, BatchUnit.TRAJECTORIES, 3)
    assert training.aggregation is Aggregation.CURRENT_ROUND_ONLY and spec.scaffold.max_turns == 100
    assert training.max_sequence_tokens == (65536 if small else 40960)  # 40,960 is what Qwen3-8B can do unchanged
    if spec.mixing.strategy is MixingStrategy.PER_TURN:
        assert [spec.mixing.beta_at(i) for i in range(1, 6)] == [1.0, 0.8, 0.6, 0.6, 0.6]
    else:
        assert [spec.mixing.max_prefix_at(i) for i in range(1, 6)] == [0, 20, 40, 60, 80]
    assert spec.student.serving and spec.teacher.serving
    serving = sum(one.replicas * one.gpus for one in (spec.student.serving, spec.teacher.serving))
    assert serving == training.gpus_per_node == 8, "one node of eight GPUs, for serving and then for training"


def test_both_students_have_both_styles() -> None:
    assert [path.stem for path in PAPER] == [f"paper-qwen3-{size}-{style}" for size in ("4b", "8b") for style in ("aggrevate", "dagger")]


@pytest.mark.parametrize(
    ("baseline", "compared"), [("sft-baseline", "paper-qwen3-4b-dagger"), ("sft-baseline-8b", "paper-qwen3-8b-dagger")]
)
def test_an_sft_baseline_is_the_teacher_alone_in_one_round_with_the_settings_of_the_run_that_it_is_compared_with(
    baseline: str, compared: str
) -> None:
    (run,), (other,) = (runs(ROOT / "manifests" / "samples" / f"{name}.yaml") for name in (baseline, compared))
    assert run.spec.rounds == 1 and run.spec.mixing.beta_at(1) == 1.0 and run.spec.tasks.per_round == 2338
    assert (run.spec.student, run.spec.teacher) == (other.spec.student, other.spec.teacher)
    fitted = {"micro_batch_tokens", "pod"}
    assert run.spec.training.model_dump(exclude=fitted) == other.spec.training.model_dump(exclude=fitted)


WITH_GPUS = [path for path in SAMPLES if "gpusPerNode" in path.read_text() and "quickstart" not in path.parts]


@pytest.mark.parametrize("path", WITH_GPUS, ids=lambda path: path.stem)
def test_a_hybrid_student_is_told_not_to_think_and_no_other(path: Path) -> None:
    (run,) = runs(path)
    serving = run.spec.student.serving
    assert serving is not None
    assert template_options(serving.extra_args) == ({"enable_thinking": False} if KNOWN[run.spec.student.model].hybrid else {})


@pytest.mark.parametrize("path", WITH_GPUS, ids=lambda path: path.stem)
def test_what_a_sample_shows_for_tainted_nodes_and_other_regions_is_valid_once_it_is_no_comment(path: Path) -> None:
    shown = re.sub(r"# (tolerations|region):", r"\1:", path.read_text())
    (spec,) = (load(one).spec for one in yaml.safe_load_all(shown) if one["kind"] == "DAggerRun")
    pods = [spec.training.pod] + [serving.pod for serving in (spec.student.serving, spec.teacher.serving) if serving is not None]
    for pod in pods:
        (toleration,) = pod.tolerations
        assert (toleration.key, toleration.operator, toleration.effect) == ("nvidia.com/gpu", "Exists", "NoSchedule")
    assert spec.storage.region


@pytest.mark.parametrize("path", WITH_GPUS, ids=lambda path: path.stem)
def test_replicas_have_time_to_read_their_teacher_from_the_hub_over_a_line_that_they_share(path: Path) -> None:
    """At 50 MB/s for all of them, and half as long again for the image and to load it."""
    (run,) = runs(path)
    if (serving := run.spec.teacher.serving) is not None:
        weights = 2 * KNOWN[run.spec.teacher.model].parameters
        assert serving.startup_deadline_seconds >= 1.5 * serving.replicas * weights / 50e6


def test_the_quickstart_is_the_same_run_on_a_cluster() -> None:
    def read(path: str) -> Json:
        return dict(yaml.safe_load((ROOT / path).read_text()))

    on_one_machine, on_a_cluster = read("examples/quickstart/dagger-run.yaml"), read("manifests/samples/quickstart/run.yaml")
    storage = on_a_cluster["spec"]["storage"]
    for path in ("student.model", "student.serving.image", "teacher.endpoint.url", "tasks.source.uri", "tasks.heldOut.source.uri"):
        *parents, field = path.split(".")
        here, there = on_one_machine["spec"], on_a_cluster["spec"]
        for name in parents:
            here, there = here[name], there[name]
        value = there.pop(field)
        here.pop(field, None)
        assert "/inputs/" not in value or value.startswith(f"{storage['url']}/inputs/")
    for one in on_one_machine, on_a_cluster:
        del one["spec"]["storage"]
    assert on_a_cluster["spec"]["sandbox"].pop("image")
    assert on_a_cluster == on_one_machine
