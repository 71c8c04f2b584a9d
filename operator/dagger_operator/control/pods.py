"""What all pods of a run have in common: environment, volumes, confinement."""

import json
from collections.abc import Iterable
from typing import Any

from dagger_operator import __version__
from dagger_operator.api import API_VERSION, KIND, DAggerRun, Endpoint, PodSettings, Role
from dagger_operator.api.ports import AGENT_PORT
from dagger_operator.api.training import Loss
from dagger_operator.control.names import server_name

Json = dict[str, Any]

SCRATCH = "/scratch"
SHARED = "/shared"
TMP = "/tmp"  # noqa: S108 - a volume of the pod's own
USER_ID = 10001
"""An ordinary user: no image needs root, and restricted namespaces admit the pods."""

WORKER_IMAGE = f"dagger-operator/worker:{__version__}"
TRAINER_IMAGE = f"dagger-operator/trainer:{__version__}"
"""Defaults if neither the run nor its operator names an image."""

READS: dict[str, frozenset[str]] = {
    "prepare": frozenset(),
    "preflight": frozenset({"labels"}),
    "rollout": frozenset({"sandbox", "labels", "rollouts"}),
    "training": frozenset({"training"}),
    "publish": frozenset(),
    "evaluation": frozenset({"sandbox", "labels", "rollouts", "evaluation"}),
    "serving": frozenset(),
}
"""Sections of the spec that a command reads, in addition to those that every command may read because they cannot change (`_ALWAYS`). Its
pods carry no others, so that an edit restarts only what it affects."""

_ALWAYS = frozenset({"seed", "mixing", "student", "teacher", "tasks", "scaffold", "storage"})


def carried_run(run: DAggerRun, command: str, role: Role | None = None) -> str:
    """Return `DAGGER_RUN` of a command: the resource as JSON, reduced to what the command reads. `role` is that of a serving pod."""
    kept = _ALWAYS | READS[command]
    spec = {key: part for key, part in run.spec.wire().items() if key in kept}
    for section in (spec.get("rollouts"), spec.get("training"), *(spec[role].get("serving") for role in Role)):
        if section is not None:
            section.pop("pod", None)  # where a pod runs does not concern what runs in it
    if "sandbox" not in kept:  # where tasks' images are pulled from concerns only sandboxes, and may be changed
        spec["tasks"].pop("imagePrefix", None)
    if command == "serving":
        spec.update({one: _as_a_server_sees(spec[one], own=one == role) for one in Role})
    if "training" not in kept and (part := _of_training(run, command)):
        spec["training"] = part
    if command == "training" and run.spec.labels.top_logprobs:  # without it ForwardKL would be refused
        spec["labels"] = {"topLogprobs": run.spec.labels.top_logprobs}
    metadata = {"name": run.metadata.name, "namespace": run.metadata.namespace, "uid": run.metadata.uid}
    document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {k: v for k, v in metadata.items() if v is not None}, "spec": spec}
    return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _of_training(run: DAggerRun, command: str) -> Json:
    """Return the part of `training` for a command that does not read all of it: what it reads, and what the document would be refused
    without."""
    part: Json = {}
    if run.spec.student.endpoint:  # which is not trained
        part["mode"] = run.spec.training.mode
    if command == "preflight" and run.spec.training.loss is Loss.FORWARD_KL:  # it asks more of a teacher
        part["loss"] = run.spec.training.loss
    return part


def _as_a_server_sees(policy: Json, *, own: bool) -> Json:
    """Return a policy without what would restart servers needlessly: sampling, replicas, and most of the other policy."""
    seen = {"model": policy["model"]}
    if serving := policy.get("serving"):
        seen["serving"] = {key: part for key, part in serving.items() if key == "toolCallParser" or (own and key != "replicas")}
    if endpoint := policy.get("endpoint"):
        seen["endpoint"] = {key: endpoint[key] for key in ("url", "model") if key in endpoint}
    return seen


def value(name: str, text: object) -> Json:
    return {"name": name, "value": str(text)}


def from_field(name: str, path: str) -> Json:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def from_secret(name: str, endpoint: Endpoint | None) -> list[Json]:
    """Return a policy's token variable if its endpoint needs one."""
    if endpoint is None or endpoint.secret_ref is None:
        return []
    reference = {"name": endpoint.secret_ref.name, "key": endpoint.secret_ref.key}
    return [{"name": name, "valueFrom": {"secretKeyRef": reference}}]


def policy_environment(run: DAggerRun, roles: Iterable[Role]) -> list[Json]:
    """Return the variables with the addresses of policies, for the commands that query them."""
    env: list[Json] = []
    for role in roles:
        policy = run.spec.student if role is Role.STUDENT else run.spec.teacher
        if policy.endpoint is not None:
            env.append(value(f"DAGGER_{role.upper()}_URL", policy.endpoint.url))
            env += from_secret(f"DAGGER_{role.upper()}_TOKEN", policy.endpoint)
            continue
        base = f"http://{server_name(run, role)}.{run.metadata.namespace}.svc:{AGENT_PORT}"
        env.append(value(f"DAGGER_{role.upper()}_URL", f"{base}/v1"))
        if role is Role.STUDENT:
            env.append(value("DAGGER_AGENT_URL", base))
    return env


def own_secrets(run: DAggerRun, settings: PodSettings) -> list[Json]:
    """Return `envFrom` of every container that runs a command of this project; the last entry wins, so all read the storage as the operator
    does."""
    storage = run.spec.storage.secret_ref
    names = [source.secret_ref.name for source in settings.env_from] + ([storage.name] if storage else [])
    return [{"secretRef": {"name": name}} for name in names]


def own_environment(run: DAggerRun, settings: PodSettings, command: str, role: Role | None = None) -> list[Json]:
    """Return the environment of every container that runs a command of this project."""
    return [
        value("DAGGER_RUN", carried_run(run, command, role)),
        from_field("DAGGER_POD", "metadata.name"),
        from_field("POD_IP", "status.podIP"),
        value("DAGGER_SCRATCH", SCRATCH),
        # The pod's user has no entry in the image's passwd, and no home.
        value("HOME", SCRATCH),
        *(value(variable.name, variable.value) for variable in settings.env),
    ]


def container(
    name: str,
    image: str,
    command: Iterable[str],
    env: Iterable[Json],
    *,
    env_from: Iterable[Json] = (),
    mounts: Iterable[tuple[str, str]] = (),
    gpus: int = 0,
    requests: Json | None = None,
    **more: Any,
) -> Json:
    """Return a container that meets the restricted pod security standard; `mounts` are (volume, path)."""
    resources: Json = {"requests": requests} if requests else {}
    if gpus:
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "env": list(env),
        **({"envFrom": sources} if (sources := list(env_from)) else {}),
        **({"resources": resources} if resources else {}),
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in (*mounts, ("tmp", TMP))],
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **more,
    }


def pod_spec(containers: list[Json], *, memory_volumes: Iterable[str] = (), volumes: Iterable[str] = (), **more: Any) -> Json:
    """Return a pod spec with no identity in the cluster, no root and no service links."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": [
            *({"name": name, "emptyDir": {}} for name in (*volumes, "tmp")),
            *({"name": name, "emptyDir": {"medium": "Memory"}} for name in memory_volumes),
        ],
        **more,
    }


def owned(
    run: DAggerRun, api_version: str, kind: str, name: str, labels: dict[str, str], annotations: dict[str, str] | None = None
) -> Json:
    """Return the metadata of an object that is deleted with the run."""
    metadata: Json = {"name": name, "namespace": run.metadata.namespace, "labels": labels}
    if annotations:
        metadata["annotations"] = annotations
    if run.metadata.uid:
        owner = {"apiVersion": API_VERSION, "kind": KIND, "name": run.metadata.name, "uid": run.metadata.uid}
        metadata["ownerReferences"] = [{**owner, "controller": True, "blockOwnerDeletion": True}]
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
