"""The rights that the chart gives the operator are enough, and it asks for nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

MANIFEST = Path(__file__).resolve().parents[2] / "manifests" / "install.yaml"
RIGHTS = {"Namespace", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"}


@pytest.fixture
def limited(control_plane: Any, tmp_path: Path) -> Iterator[Path]:
    """A kubeconfig of the operator's ServiceAccount, with the rights of the plain manifests."""
    rights = yaml.safe_dump_all([one for one in yaml.safe_load_all(MANIFEST.read_text()) if one and one["kind"] in RIGHTS])
    control_plane.kubectl("apply", "-f", "-", input=rights)
    try:
        token = control_plane.kubectl("create", "token", "dagger-operator", "--namespace=dagger-system").strip()
        config = yaml.safe_load(control_plane.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        path = tmp_path / "limited"
        path.write_text(yaml.safe_dump(config))
        yield path
    finally:
        control_plane.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", input=rights)


async def test_a_run_with_sandbox_pods_succeeds_with_the_charts_rights(lab: Any, make_operator: Any, limited: Path) -> None:
    operator = make_operator(namespaces="", namespace="dagger-system", sandbox_namespace="dagger-sandboxes", helper_image="worker:1")
    operator.kubeconfig = limited
    operator.start()
    lab.paused = {"rollout"}
    await lab.create()
    await lab.until_job("rollout")
    account = await lab.client.get("v1", "ServiceAccount", lab.namespace, "demo-worker")
    assert account["metadata"]["ownerReferences"][0]["kind"] == "DAggerRun"
    binding = await lab.client.get("rbac.authorization.k8s.io/v1", "RoleBinding", "dagger-sandboxes", f"{lab.namespace}.demo.worker")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "demo-worker", "namespace": lab.namespace}]
    lab.paused = set()
    await lab.until_phase("Succeeded")
    # It sees all namespaces, also those of other tests that are on their way out.
    log = [line for line in operator.log.read_text().splitlines() if "being terminated" not in line]
    forbidden = [line for line in log if "orbidden" in line and '"event": "run"' not in line]
    assert not forbidden, forbidden
    assert not [line for line in log if "event not told" in line]
