"""What the samples ask of a cluster, as docs/operating.md says it: every number comes from the manifests that the operator would apply, and
hours from the estimate."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.api import DAggerRun, GpuSharing, Overlap, Role, RunSpec, load
from dagger_operator.control import Results, StageName, Step
from dagger_operator.control.jobs import build_job, pods_of
from dagger_operator.control.servers import build_server, served
from dagger_operator.estimate import GIB, GPUS, KNOWN, Assumptions, estimate
from dagger_operator.estimate.host import STORED, amount, whole_gib
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.pod_manifest import Setting, pod
from dagger_operator.store.results import PrepareResult

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operating.md").read_text()
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
RESULTS = Results({(0, "prepare"): PrepareResult(policy="r000-base", teacher="teacher-1")})
GPU, DISK = "nvidia.com/gpu", "ephemeral-storage"
Asks = Counter[str]
"""Processors, bytes, GPUs, by the resource's name."""


def asked(spec: dict[str, Any], pods: int) -> Asks:
    """What is set aside for pods: of each its containers together, or the one that comes before them and asks for more."""

    def of(container: dict[str, Any]) -> Asks:
        both = {**container["resources"].get("limits", {}), **container["resources"].get("requests", {})}
        return Counter({name: pods * amount(size) for name, size in both.items()})

    together = reduce(Asks.__add__, map(of, spec["containers"]))
    return reduce(Asks.__or__, map(of, spec.get("initContainers", ())), together)


@dataclass(frozen=True)
class Needs:
    """All of a kind at once."""

    servers: Asks
    training: Asks
    workers: Asks
    sandboxes: Asks
    pods: dict[str, int]
    gpus: int


def needs(run: DAggerRun) -> Needs:
    def of(stage: StageName) -> Asks:
        return asked(build_job(run, Step(1, stage), RESULTS)["spec"]["template"]["spec"], pods_of(run, stage))

    spec = run.spec
    serving = [(role, one) for role in Role if (one := served(run, role)) is not None]
    templates = [(build_server(run, role, one, replicas=one.replicas)["spec"]["template"]["spec"], one.replicas) for role, one in serving]
    servers = reduce(Asks.__add__, (asked(*template) for template in templates))
    training = of(StageName.TRAINING)
    beside = spec.evaluation.overlap is Overlap.NEXT_ROUND and any(spec.evaluation.at(i, spec.rounds) for i in range(spec.rounds))
    workers = of(StageName.ROLLOUT) + (of(StageName.EVALUATION) if beside else Counter())
    setting = Setting(run.metadata.name, "lab", "rollout-0", "0" * 8, "helper:1", spec.sandbox.limits, 3600)
    owner = {"metadata": {"name": "lease", "uid": "u"}}
    # A worker makes no more of them (`rollout.sandboxes`).
    count = 2 * spec.rollouts.concurrency * spec.rollouts.workers * (1 + beside)
    sandboxes = asked(pod(setting, SandboxRequest("one", image="i"), digest="0" * 64, owner=owner)["spec"], count)
    pods = {"servers": sum(one.replicas for _, one in serving), "workers": spec.rollouts.workers * (1 + beside), "sandboxes": count}
    gpus = max(servers[GPU], training[GPU]) if spec.gpu_sharing is GpuSharing.TIME_SHARED else servers[GPU] + training[GPU]
    return Needs(servers, training, workers, sandboxes, pods, int(gpus))


def the_run(path: Path) -> DAggerRun:
    (document,) = (one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "DAggerRun")
    return load(document)


def hours(spec: RunSpec) -> str:
    found = estimate(spec, GPUS["H100-80GB"], KNOWN[spec.student.model], KNOWN.get(spec.teacher.model), Assumptions.of(spec))
    return f"{found.hours:.0f}, {found.gpu_hours:.0f}"


def row(path: Path) -> str:
    run = the_run(path)
    found, held_out = needs(run), Assumptions.of(run.spec).held_out

    def said(asks: Asks, *names: str) -> str:
        return ", ".join(f"{asks[name] / (1 if name == 'cpu' else GIB):g}{'' if name == 'cpu' else 'Gi'}" for name in names)

    cells = (
        f"`{path.stem}`",
        f"{found.gpus}",
        f"{found.pods['servers']}: {said(found.servers, 'memory', DISK)}",
        said(found.training, "memory", DISK),
        f"{found.pods['workers']}: {said(found.workers, 'cpu', 'memory')}",
        f"{found.pods['sandboxes']}: {said(found.sandboxes, 'cpu', 'memory', DISK)}",
        f"{run.spec.tasks.per_round}, {held_out}",
        hours(run.spec),
    )
    return f"| {' | '.join(cells)} |"


def test_the_table_of_what_a_run_asks_is_that_of_the_samples_manifests() -> None:
    _, _, after = PAGE.partition("| sample | GPUs |")
    written = [line for line in after.split("\n\n")[0].splitlines()[2:] if line.startswith("|")]
    rows = [row(path) for path in SAMPLES]
    assert written == rows, "write these rows:\n" + "\n".join(rows)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_documents_count_the_disk_that_prepare_fills_and_does_not_ask_for(path: Path) -> None:
    run = the_run(path)
    asks = asked(build_job(run, Step(0, StageName.PREPARE), RESULTS)["spec"]["template"]["spec"], 1)
    assert DISK not in asks, "the page says that it asks for none"
    model = run.spec.student.model
    (told,) = re.findall(r"\*\*The one that prepares\*\*.*?\n\n", PAGE, re.S)
    assert f"{whole_gib(STORED * KNOWN[model].parameters)} for `{model}`" in " ".join(told.split())


def kueue(kind: str) -> dict[str, Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    (found,) = (one for block in blocks for one in yaml.safe_load_all(block) if one["kind"] == kind)
    assert found["apiVersion"] == "kueue.x-k8s.io/v1beta2"
    return dict(found)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_queue_that_the_documents_show_admits_every_sample(path: Path) -> None:
    found, queue = needs(the_run(path)), kueue("ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == kueue("ResourceFlavor")["metadata"]["name"]
    assert kueue("LocalQueue")["spec"]["clusterQueue"] == queue["metadata"]["name"]
    room = {one["name"]: amount(str(one["nominalQuota"])) for one in flavor["resources"]}
    assert list(room) == group["coveredResources"]
    for asks in found.servers + found.workers, found.training:  # one after the other: they share the GPUs
        assert set(asks) <= set(room)
        assert all(asks[name] <= room[name] for name in asks), (asks, room)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_sample_says_how_many_images_it_pulls(path: Path) -> None:
    spec = the_run(path).spec
    assert f"{spec.tasks.per_round} are pulled a round and {Assumptions.of(spec).held_out} for evaluation" in path.read_text()
