"""The real operator as the chart's ServiceAccount: what the chart lets it do is enough for what it does."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dagger_operator.api import Storage, load
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.results import PreflightResult, PrepareResult, save_result

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


@pytest.fixture
def operator_log(release: Any, control_plane: Any, tmp_path: Path) -> Iterator[Path]:
    """Started with the environment that the chart gives it, and the token of its ServiceAccount."""
    account, token = (
        "dagger-operator",
        release.kubectl("create", "token", "dagger-operator", f"--namespace={release.system}").stdout.strip(),
    )
    settings = yaml.safe_load(Path(control_plane.kubeconfig).read_text())
    settings["users"] = [{"name": account, "user": {"token": token}}]
    settings["contexts"][0]["context"]["user"] = account
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    deployment = json.loads(release.kubectl("get", "deployment", account, f"--namespace={release.system}", "-o", "json").stdout)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    told = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    told |= {"DAGGER_OPERATOR_NAMESPACE": release.system, "DAGGER_OPERATOR_POD": "one"}  # by fieldRef in a pod
    told |= {"DAGGER_OPERATOR_METRICS_PORT": "0", "DAGGER_OPERATOR_HEALTH_PORT": "0"}
    log = tmp_path / "log"
    with log.open("w") as output:
        environ = {**os.environ, **told, "KUBECONFIG": str(tmp_path / "kubeconfig")}
        process = subprocess.Popen([sys.executable, *container["command"][1:]], env=environ, stdout=output, stderr=output)
    try:
        yield log
    finally:
        process.terminate()
        process.wait(timeout=60)


def until(what: str, holds: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline, f"{what}: {log.read_text()[-6000:]}"
        time.sleep(0.3)


async def test_its_rights_are_enough_for_a_run_from_the_first_object_to_the_last(release: Any, operator_log: Path, tmp_path: Path) -> None:
    sample = (ROOT / "manifests" / "samples" / "endpoint-teacher.yaml").read_text()
    run: Json = next(one for one in yaml.safe_load_all(sample) if one["kind"] == "DAggerRun")
    run["metadata"]["namespace"] = release.runs
    run["spec"]["storage"] = {"url": f"file://{tmp_path}/storage", "secretRef": {"name": "storage"}}
    run["spec"]["student"] = {"model": "student", "endpoint": {"url": "http://student/v1"}}
    run["spec"]["training"] = {"mode": "Disabled"}
    run["spec"]["suspend"] = True
    name, where = run["metadata"]["name"], f"--namespace={release.runs}"
    release.kubectl("create", "secret", "generic", "storage", "--from-literal=A=b", where)
    made = release.create(run, keep=True)
    assert made.returncode == 0, made.stderr

    # As if the first stages had been: then rollouts are next, whose workers need rights in the sandbox namespace.
    store = Store.open(Storage(url=f"file://{tmp_path}/storage"))
    await take_prefix(store, load(json.loads(release.kubectl("get", "daggerrun", name, where, "-o", "json").stdout)))
    await save_result(store, 0, PrepareResult(policy="endpoint-student", teacher="endpoint-teacher"))
    await save_result(store, 0, PreflightResult(student="endpoint-student", teacher="endpoint-teacher", checks={}))
    release.kubectl("patch", "daggerrun", name, where, "--type=merge", "--patch", '{"spec": {"suspend": false}}')

    def there(kind: str, namespace: str) -> str:
        selector = "app.kubernetes.io/managed-by=dagger-operator"
        names: str = release.kubectl("get", kind, f"--namespace={namespace}", "-l", selector, "-o", "name").stdout
        return names

    until("workers have a Job", lambda: "-rollout-" in there("jobs", release.runs), operator_log)
    until("workers have an identity", lambda: f"{name}-worker" in there("serviceaccounts", release.runs), operator_log)
    until("workers may make sandboxes", lambda: name in there("rolebindings", release.sandboxes), operator_log)
    status = ["get", "daggerrun", name, where, "-o", "jsonpath={.status.phase}"]
    until("it has a status", lambda: bool(release.kubectl(*status).stdout), operator_log)
    told = ["get", "events", where, "--field-selector=involvedObject.kind=DAggerRun", "-o", "name"]
    until("it has an Event", lambda: bool(release.kubectl(*told).stdout), operator_log)
    release.kubectl("delete", "daggerrun", name, where)
    until("what it owned goes with it", lambda: not there("jobs,services,serviceaccounts", release.runs), operator_log)
    refused = [line for line in operator_log.read_text().splitlines() if re.search(r"[Ff]orbidden|\b403\b", line)]
    assert not refused, refused
