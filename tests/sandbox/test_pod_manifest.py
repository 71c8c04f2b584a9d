"""What a sandbox pod looks like, and what its status is taken for: no cluster needed."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import SandboxLimits, SandboxPod
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.pod_manifest import Setting, pod, pod_name
from dagger_operator.sandbox.pod_state import Stand, state_of
from dagger_operator.sandbox.worker_lease import lease_of

OWNER = {"metadata": {"name": "lease", "uid": "u"}}


def setting(**more: Any) -> Setting:
    usual = {"run": "r", "run_namespace": "team", "worker": "rollout-0", "life": "0a1b2c3d", "helper_image": "worker:1"}
    return Setting(**{**usual, "limits": SandboxLimits(), "lifetime_seconds": 900, "image": "task:1", **more})


def spec_of(request: SandboxRequest, **more: Any) -> dict[str, Any]:
    spec: dict[str, Any] = pod(setting(**more), request, digest="d", owner=OWNER)["spec"]
    return spec


def test_a_sandbox_pod_is_confined() -> None:
    spec = spec_of(SandboxRequest("one"))
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["restartPolicy"] == "Never" and spec["activeDeadlineSeconds"] == 900
    assert spec["dnsPolicy"] == "None" and spec["dnsConfig"] == {"nameservers": ["127.0.0.1"]}
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert all("emptyDir" in volume for volume in spec["volumes"])
    for container in (*spec["initContainers"], *spec["containers"]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        for amounts in ("requests", "limits"):
            assert set(container["resources"][amounts]) == {"cpu", "memory", "ephemeral-storage"}
    (mount,) = spec_of(SandboxRequest("one", image="swe:1"))["containers"][0]["volumeMounts"]
    assert mount["readOnly"] is True


def test_the_token_itself_is_nowhere_in_the_pod_and_its_lease_owns_it() -> None:
    made = pod(setting(), SandboxRequest("one", env={"SECRET": "of the command"}), digest="its-hash", owner=OWNER)
    assert made["spec"]["containers"][0]["env"] == [{"name": "DAGGER_TOKEN_SHA256", "value": "its-hash"}]
    assert "of the command" not in str(made)
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": "lease", "uid": "u"}
    assert made["metadata"]["ownerReferences"] == [{**lease, "controller": True}], "a drain takes pods that have a controller"


def test_only_a_pod_with_a_way_to_the_gateway_wears_the_label_that_opens_it() -> None:
    closed = pod(setting(), SandboxRequest("one"), digest="d", owner=OWNER)
    opened = pod(setting(), SandboxRequest("one", network_to="10.0.0.1:8090"), digest="d", owner=OWNER)
    assert "dagger-operator.dev/network" not in closed["metadata"]["labels"]
    assert opened["metadata"]["labels"]["dagger-operator.dev/network"] == "gateway"
    assert "-forward=10.0.0.1:8090" in opened["spec"]["containers"][0]["command"]


def test_what_the_run_says_of_its_pods_is_there_and_cannot_loosen_them() -> None:
    wishes = SandboxPod.model_validate(
        {
            "nodeSelector": {"pool": "sandboxes"},
            "tolerations": [{"key": "sandbox", "operator": "Exists"}],
            "priorityClassName": "low",
            "runtimeClassName": "gvisor",
            "hostUsers": False,
            "runAsUser": 1000,
            "imagePullSecrets": [{"name": "mirror"}],
        }
    )
    spec = spec_of(SandboxRequest("one", image="other:2"), pod=wishes)
    assert spec["nodeSelector"] == {"pool": "sandboxes"} and spec["tolerations"] == [{"key": "sandbox", "operator": "Exists"}]
    assert (spec["priorityClassName"], spec["runtimeClassName"], spec["hostUsers"]) == ("low", "gvisor", False)
    assert spec["imagePullSecrets"] == [{"name": "mirror"}]
    assert spec["securityContext"]["runAsUser"] == 1000 and spec["securityContext"]["runAsNonRoot"] is True
    assert "runAsUser" not in spec and spec["containers"][0]["image"] == "other:2"


def test_a_task_without_an_image_of_its_own_starts_in_a_folder_that_any_user_may_write_to() -> None:
    def mounts(request: SandboxRequest) -> list[str]:
        return [mount["mountPath"] for mount in spec_of(request)["containers"][0]["volumeMounts"]]

    assert mounts(SandboxRequest("one", workdir="/work")) == ["/dagger", "/work"]
    assert mounts(SandboxRequest("one", image="swe:1", workdir="/work")) == ["/dagger"], "what the image has there is the task"


def test_a_task_without_an_image_is_told_what_to_set() -> None:
    with pytest.raises(SandboxError, match=r"NoImage.*spec\.sandbox\.image"):
        spec_of(SandboxRequest("one"), image=None)


@given(name=st.text(max_size=300), other=st.text(max_size=300), namespace=st.sampled_from(["a", "b"]))
def test_names_fit_are_the_same_again_and_differ_for_what_differs(name: str, other: str, namespace: str) -> None:
    one = pod_name(setting(), SandboxRequest(name))
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one) and len(one) <= 63
    assert one == pod_name(setting(life="ffffffff", worker="rollout-9"), SandboxRequest(name))
    different = pod_name(setting(run_namespace=namespace), SandboxRequest(other))
    assert different != one  # at least in its namespace
    lease = lease_of(setting(run="x" * 60, worker="evaluation-1023"), datetime.now(UTC))["metadata"]["name"]
    assert len(lease) <= 63 and lease.endswith("-0a1b2c3d")


def seen(status: dict[str, Any], **metadata: Any) -> tuple[Stand, str]:
    state = state_of({"metadata": {"name": "p", **metadata}, "status": status})
    return state.stand, state.reason


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, "state": state}


RUNNING = [container("sandbox", running={})]
UNSCHEDULABLE = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]
PREEMPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "for another"}]


@pytest.mark.parametrize(
    ("status", "stand", "reason"),
    [
        ({}, Stand.COMING, ""),
        ({"phase": "Pending", "conditions": UNSCHEDULABLE}, Stand.COMING, "Unschedulable"),
        ({"initContainerStatuses": [container("helper", waiting={"reason": "PodInitializing"})]}, Stand.COMING, ""),
        ({"initContainerStatuses": [container("helper", waiting={"reason": "ErrImagePull"})]}, Stand.STUCK, "ErrImagePull"),
        ({"containerStatuses": [container("sandbox", waiting={"reason": "ImagePullBackOff"})]}, Stand.STUCK, "ImagePullBackOff"),
        ({"containerStatuses": [container("sandbox", waiting={"reason": "InvalidImageName"})]}, Stand.ENDED, "InvalidImageName"),
        ({"phase": "Running", "containerStatuses": RUNNING}, Stand.COMING, ""),
        ({"phase": "Running", "containerStatuses": RUNNING, "podIP": "10.1.1.1"}, Stand.READY, ""),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, Stand.ENDED, "Evicted"),
        ({"phase": "Failed", "reason": "DeadlineExceeded"}, Stand.ENDED, "DeadlineExceeded"),
        ({"phase": "Failed", "conditions": PREEMPTED}, Stand.ENDED, "PreemptionByScheduler"),
        (
            {"phase": "Failed", "containerStatuses": [container("sandbox", terminated={"reason": "OOMKilled", "exitCode": 137})]},
            Stand.ENDED,
            "OOMKilled",
        ),
        (
            {"phase": "Failed", "initContainerStatuses": [container("helper", terminated={"reason": "StartError", "exitCode": 128})]},
            Stand.ENDED,
            "StartError",
        ),
    ],
)
def test_a_pods_status_is_told_in_its_own_words(status: dict[str, Any], stand: Stand, reason: str) -> None:
    assert seen(status) == (stand, reason)


KILLED = [container("sandbox", terminated={"reason": "OOMKilled", "exitCode": 137})]
LOW = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 98892Ki. "
USING = "Container sandbox was using 2Gi, request is 1Gi, has larger consumption of memory. "


@pytest.mark.parametrize(
    ("status", "exceeded"),
    [
        # A kubelet's own words, as of Kubernetes 1.34.
        ({"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit of containers 10304Mi. "}, True),
        ({"reason": "Evicted", "message": 'Container sandbox exceeded its local ephemeral storage limit "10304Mi". '}, True),
        ({"reason": "Evicted", "message": 'Usage of EmptyDir volume "workdir" exceeds the limit "10Gi". '}, True),
        ({"containerStatuses": KILLED}, True),
        # No command can write there.
        ({"reason": "Evicted", "message": 'Usage of EmptyDir volume "dagger" exceeds the limit "64Mi". '}, False),
        ({"initContainerStatuses": [KILLED[0] | {"name": "helper"}]}, False),
        # The node's want, whoever caused it.
        ({"reason": "Evicted", "message": LOW + USING}, False),
        ({"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage. "}, False),
        ({"reason": "Evicted", "message": LOW + USING, "containerStatuses": KILLED}, False),
        ({"reason": "Evicted"}, False),
        ({"conditions": PREEMPTED, "containerStatuses": KILLED}, False),
        ({"reason": "DeadlineExceeded", "containerStatuses": KILLED}, False),
        ({"containerStatuses": [container("sandbox", terminated={"reason": "Error", "exitCode": 137})]}, False),
    ],
)
def test_a_pod_that_its_own_limits_ended_is_told_from_one_that_its_node_gave_up(status: dict[str, Any], exceeded: bool) -> None:
    for metadata in ({}, {"deletionTimestamp": "2026-01-01T00:00:00Z"} if exceeded else {}):
        state = state_of({"metadata": {"name": "p", **metadata}, "status": {"phase": "Failed", **status}})
        assert (state.stand, state.exceeded) == (Stand.ENDED, exceeded)


def test_a_pod_on_its_way_says_which_container_waits_for_its_image_or_its_volumes() -> None:
    waits = container("sandbox", waiting={"reason": "ContainerCreating"})
    state = state_of({"metadata": {"name": "p"}, "status": {"phase": "Pending", "containerStatuses": [waits]}})
    assert (state.stand, state.reason) == (Stand.COMING, "")
    assert state.message == "container sandbox is being made: its image is pulled, or a volume mounted"


def test_a_pod_that_is_being_deleted_is_over_though_it_still_runs() -> None:
    status = {"phase": "Running", "containerStatuses": RUNNING, "podIP": "10.1.1.1"}
    assert seen(status, deletionTimestamp="2026-01-01T00:00:00Z") == (Stand.ENDED, "PodDeleted")
