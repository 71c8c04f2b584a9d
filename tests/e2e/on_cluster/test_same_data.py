"""A seed gives the data on a cluster that it gives on one machine, also where all that can be taken away is taken away."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.scripted import scripted_policies

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1700)]

ROOT = Path(__file__).parents[3]
SMALL = {"requests": {"cpu": "100m", "memory": "256Mi"}}
SECRET = "dagger-operator-s3"


@pytest.fixture
def policies(cluster: Any) -> Iterator[str]:
    """Base URL of the scripted policies, one that this machine and the cluster's pods both reach: it is part of a policy's version."""
    if cluster.host is None:
        pytest.skip("pods cannot reach this machine: DAGGER_TEST_HOST says under which address they could")
    with scripted_policies(cluster.host) as url:
        yield url


def _labelling_only(url: str) -> dict[str, Any]:
    """Two rounds of labelling with a deterministic student: no vLLM, no training."""
    return {
        "rounds": 2,
        "student": {"model": "scripted-student", "endpoint": {"url": url}, "serving": None},
        "mixing": {"strategy": "PerTurn", "beta": {"type": "Constant", "value": 0.3}},
        "tasks": {"firstRound": 24, "perRound": 16},
        "rollouts": {"workers": 2, "concurrency": 2, "leaseSeconds": 5, "infrastructureRetries": 50},
        "training": {"mode": "Disabled"},
        "sandbox": {"createTimeoutSeconds": 120, "commandTimeoutSeconds": 60},
    }


def _on_the_cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    spec["sandbox"] |= {"image": "dagger-operator/worker:0.1.0"}
    spec["sandbox"]["limits"]["cpus"] = 0.5
    spec["rollouts"] |= {
        "pod": {"resources": SMALL},
        "workers": 1,
        "concurrency": 1,
    }  # to be at work until the last fault on a quick machine too
    spec["storage"] = {
        "url": "s3://dagger/one",
        "endpointUrl": "http://dagger-operator-s3.dagger-system.svc:7070",
        "region": "us-east-1",
        "secretRef": {"name": SECRET},
    }
    source = {"type": "JSONL", "uri": "s3://dagger/one/inputs/tasks.jsonl"}
    spec["tasks"] |= {"source": {**source, "split": "train"}, "heldOut": {"source": {**source, "split": "heldout"}}}
    return document


def test_the_data_is_what_one_machine_makes_whatever_is_taken_away(installation: Any, runs: Any, policies: str) -> None:
    local = runs.inside("local")
    local.teacher = policies
    document = Path(local.document("one", **_labelling_only(policies)))
    local.ctl("run", str(document))

    tasks = (local.folder / "tasks.jsonl").read_bytes()
    asyncio.run(installation.store("s3://dagger/one").put("inputs/tasks.jsonl", tasks))
    installation.apply(_on_the_cluster(yaml.safe_load(document.read_text())))
    theirs = () if os.environ.get("DAGGER_TEST_KUBECONFIG") else (_api_server, _node)  # somebody else's are left alone
    for take_away in (_nothing, _operator, _workers, _sandboxes, _storage, _two_operators, _upgrade, *theirs):
        done = _finished(installation)
        assert installation.run("one").get("status", {}).get("phase") != "Succeeded", f"over before {take_away.__name__}"
        take_away(installation)
        installation.until(f"rollouts go on after {take_away.__name__}", lambda done=done: _goes_on(installation, done), 300)
    # An edit in flight begins the round's workers anew, too.
    installation.kubectl(
        "patch", "daggerrun", "one", "--type=merge", "--patch", json.dumps({"spec": {"rollouts": {"workers": 2, "concurrency": 4}}})
    )
    run = installation.ended("one", 600)

    digests = [entry["rollout"]["dataDigest"] for entry in run["status"]["rounds"]]
    assert digests == [entry["rollout"]["dataDigest"] for entry in local.status("one")["rounds"]]
    installation.all_is_sound("one")
    installation.nothing_is_left("one")


def _finished(installation: Any) -> int:
    """Rollouts that are done, of both rounds, as the status tells them."""
    status = installation.run("one").get("status", {})
    rounds = sum(entry["rollout"]["rollouts"] for entry in status.get("rounds", ()) if entry.get("rollout"))
    progress = status.get("progress") or {}
    return int(rounds + (progress.get("done", 0) if progress.get("stage") == "rollout" else 0))


def _goes_on(installation: Any, done: int) -> bool:
    return _finished(installation) > done or installation.run("one").get("status", {}).get("phase") == "Succeeded"


def _nothing(installation: Any) -> None:
    """The run as it starts."""


def _operator(installation: Any) -> None:
    installation.kill_operator()


def _workers(installation: Any) -> None:
    installation.kill(installation.namespace, "dagger-operator.dev/component=rollout")


def _sandboxes(installation: Any) -> None:
    installation.kill_sandboxes()


def _storage(installation: Any) -> None:
    """For 30 seconds, which the run notices; its data is on a volume."""
    scale = ("--namespace", installation.system, "scale", "deployment/dagger-operator-s3")
    installation.kubectl(*scale, "--replicas=0")
    since = time.monotonic()
    installation.until("the run says so", lambda: installation.run("one")["status"].get("reason") == "StorageUnavailable", 60)
    time.sleep(max(0, 30 - (time.monotonic() - since)))
    installation.kubectl(*scale, "--replicas=1")


def _two_operators(installation: Any) -> None:
    installation.kubectl("--namespace", installation.system, "scale", "deployment/dagger-operator", "--replicas=2")
    installation.until("both run", lambda: [pod["status"]["phase"] for pod in installation.operators()] == ["Running"] * 2, 120)


def _upgrade(installation: Any) -> None:
    """Of the chart: new pods of the operator take over from the old ones."""
    before = {pod["metadata"]["name"] for pod in installation.operators()}
    installation.upgrade("podAnnotations.upgraded=again")
    installation.until("only new ones run", lambda: before.isdisjoint(pod["metadata"]["name"] for pod in installation.operators()), 120)


def _api_server(installation: Any) -> None:
    before = _in_the_node("pgrep", "kube-apiserver")
    _in_the_node("pkill", "-KILL", "kube-apiserver")
    installation.until("the API server is back", lambda: installation.kubectl("get", "--raw", "/readyz"), 120)
    assert _in_the_node("pgrep", "kube-apiserver") != before


def _node(installation: Any) -> None:
    """Not ready for longer than the grace period."""
    _in_the_node("pkill", "-STOP", "kubelet")
    try:
        installation.until("the node is not ready", lambda: not _ready(installation), 120)
    finally:
        _in_the_node("pkill", "-CONT", "kubelet")
    installation.until("the node is ready", lambda: _ready(installation), 120)


def _ready(installation: Any) -> bool:
    path = '{.items[*].status.conditions[?(@.type=="Ready")].status}'
    return bool(installation.kubectl("get", "nodes", "-o", f"jsonpath={path}") == "True")


def _in_the_node(*command: str) -> str:
    return subprocess.run([ROOT / "tests" / "cluster" / "in", *command], check=True, stdout=subprocess.PIPE, text=True).stdout
