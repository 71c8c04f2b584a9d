"""Runs that an API server stored under an older version of the CRD: what becomes of them when the CRD and the operator are newer."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from fixtures.tools import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Json = dict[str, Any]
MANIFEST = ROOT / "manifests" / "crd" / "daggerruns.yaml"
OLD = "dagger-operator.dev/v1alpha0"


def crd(stored: str) -> Json:
    """Today's CRD with v1alpha0 beside it, of a release that had a field which is gone and required none; `stored` is what is stored."""
    whole: Json = yaml.safe_load(MANIFEST.read_text())
    (today,) = whole["spec"]["versions"]
    old = copy.deepcopy(today)
    old["name"] = "v1alpha0"
    spec = old["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["x-kubernetes-validations"]
    del spec["required"]
    spec["properties"]["rollouts"]["properties"]["perTask"] = {"type": "integer"}
    status = old["schema"]["openAPIV3Schema"]["properties"]["status"]
    status["properties"]["phase"] = {"type": "string"}
    for one in (today, old):
        one["storage"] = one["name"] == stored
    whole["spec"]["versions"] = [today, old]
    return whole


@pytest.fixture
def apply_crd(control_plane: Any) -> Iterator[Callable[[Json | None], None]]:
    """Installs a CRD, today's where none is given, and waits until its versions answer. In the end only today's is left, as it was."""

    def install(manifest: Json | None = None) -> None:
        manifest = manifest or yaml.safe_load(MANIFEST.read_text())
        control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=json.dumps(manifest))
        for version in manifest["spec"]["versions"]:
            answers(control_plane, version["name"])

    yield install
    control_plane.kubectl("delete", "daggerruns", "--all", "--all-namespaces")
    only_today(control_plane)
    install()


def answers(control_plane: Any, version: str) -> None:
    for _ in range(100):
        try:
            control_plane.kubectl("get", f"daggerruns.{version}.dagger-operator.dev", "--all-namespaces")
            return
        except RuntimeError as error:
            said = error
    raise said


def only_today(control_plane: Any) -> None:
    """The last step of docs/operating.md: it says that nothing is stored in the old version any more."""
    path = ("patch", "crd", "daggerruns.dagger-operator.dev", "--subresource=status", "--type=merge")
    control_plane.kubectl(*path, "-p", '{"status":{"storedVersions":["v1alpha1"]}}')


def stored_versions(control_plane: Any) -> list[str]:
    seen = control_plane.kubectl("get", "crd", "daggerruns.dagger-operator.dev", "-o", "jsonpath={.status.storedVersions}")
    return sorted(json.loads(seen))


async def test_runs_of_an_older_version_are_taken_over_and_none_is_lost(
    lab: Any, make_operator: Callable[..., Any], control_plane: Any, apply_crd: Callable[..., None]
) -> None:
    apply_crd(crd(stored="v1alpha0"))
    fine = lab.document("fine", rollouts={"perTask": 2}, rounds=1)
    broken = lab.document("broken")
    whole, broken["spec"] = broken["spec"], {}
    for one in (fine, broken):
        control_plane.kubectl("create", "-f", "-", input=json.dumps({**one, "apiVersion": OLD}))
    head = {"name": "fine", "namespace": lab.namespace}
    known = {"type": "Labelled", "status": "True", "reason": "Old", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    said = {"apiVersion": OLD, "kind": "DAggerRun", "metadata": head, "status": {"phase": "Labelling", "conditions": [known]}}
    by_the_old_operator = ("apply", "--server-side", "--field-manager=dagger-operator", "--subresource=status", "-f", "-")
    control_plane.kubectl(*by_the_old_operator, input=json.dumps(said))
    uids = {name: (await lab.run(name))["metadata"]["uid"] for name in ("fine", "broken")}

    # Before the upgrade the new release says what it will not know any more: a stored field that is gone is dropped in silence.
    old = control_plane.kubectl("get", "daggerruns.v1alpha0.dagger-operator.dev", "fine", f"--namespace={lab.namespace}", "-o", "yaml")
    validate = [sys.executable, "-m", "dagger_operator.cli", "validate", "-"]
    checked = subprocess.run(validate, input=old, capture_output=True, text=True)
    assert checked.returncode == 2
    assert "spec.rollouts.perTask: unknown field" in checked.stderr
    fields = {line.split(": ")[1] for line in checked.stderr.splitlines()}
    assert fields == {"apiVersion", "spec.rollouts.perTask", "status.phase"}, "what else kubectl writes can be read"

    # The new release's CRD alone is refused while runs are stored that it could not read.
    with pytest.raises(RuntimeError, match=r"storedVersions.*v1alpha0.*missing from spec.versions"):
        apply_crd()
    assert stored_versions(control_plane) == ["v1alpha0", "v1alpha1"]

    apply_crd(crd(stored="v1alpha1"))
    make_operator(lease="-").start()
    refused = await lab.until_reason("InvalidSpec", "broken")
    (accepted,) = (one for one in refused["status"]["conditions"] if one["type"] == "Accepted")
    for field in ("student", "teacher", "tasks", "storage"):
        assert f"spec.{field}: missing: this field is required" in accepted["message"]
    done = await lab.until_phase("Succeeded", "fine")
    assert "Labelled" not in [one["type"] for one in done["status"]["conditions"]], "what another version said is not left standing"
    assert "perTask" not in done["spec"]["rollouts"]
    assert not [name for name in lab.jobs.values() if name.startswith("broken")]

    # docs/operating.md: every run is written once more, then the old version can go.
    every = control_plane.kubectl("get", "daggerruns", "--all-namespaces", "-o", "json")
    control_plane.kubectl("replace", "--validate=false", "-f", "-", input=every)
    only_today(control_plane)
    apply_crd()
    assert stored_versions(control_plane) == ["v1alpha1"]
    assert {name: (await lab.run(name))["metadata"]["uid"] for name in uids} == uids
    assert (await lab.run("fine"))["status"]["rounds"] == done["status"]["rounds"]
    await lab.edit("broken", **whole)
    await lab.until_phase("Succeeded", "broken")
