"""Where a worker's commands run: in pods if a namespace for them exists, otherwise in processes; and how a sandbox reaches the gateway."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import TypedDict

from dagger_operator.api import Rollouts, Sandbox, SandboxBackend, ScaffoldType
from dagger_operator.api.ports import GATEWAY_PORT
from dagger_operator.sandbox.interface import SandboxError, SandboxProvider
from dagger_operator.sandbox.process import NO_NAMESPACES, ProcessSandboxes
from dagger_operator.store.stage import Stage, StageFailure
from dagger_operator.tasks.grading import longest_work

_SPARE_SECONDS = 600
"""For files that are transferred between a sandbox's commands, and for a busy helper or network at each of them."""


class GatewayPlace(TypedDict, total=False):
    """`Gateway` arguments for where it listens."""

    host: str
    port: int
    advertise: str


def in_pods(stage: Stage) -> bool:
    """Whether sandboxes are pods: as the spec says; if it leaves that open, when the runtime offers a namespace for them."""
    backend = stage.run.spec.sandbox.backend
    return backend is SandboxBackend.POD or (backend is None and bool(stage.environ.get("DAGGER_SANDBOX_NAMESPACE")))


@asynccontextmanager
async def sandboxes(stage: Stage) -> AsyncIterator[SandboxProvider]:
    """Open the sandbox provider. Raises `StageFailure` if sandboxes cannot be created, at the start or any more."""
    spec = stage.run.spec.sandbox
    provider: SandboxProvider = (
        _pods(stage)
        if in_pods(stage)
        else ProcessSandboxes(spec.limits, stage.scratch / "sandboxes", allow_unconfined=spec.allow_unconfined)
    )
    try:
        await provider.__aenter__()
    except SandboxError as error:
        raise StageFailure(error.reason, error.message, permanent=error.reason == NO_NAMESPACES) from error
    try:
        yield provider
    finally:
        try:
            await provider.__aexit__(None, None, None)
        except SandboxError as error:
            raise StageFailure(error.reason, error.message, permanent=False) from error


def _pods(stage: Stage) -> SandboxProvider:
    # Imported only here: the Kubernetes client takes a second to import.
    from dagger_operator.sandbox.pod_manifest import Setting
    from dagger_operator.sandbox.pods import PodSandboxes

    spec, environ = stage.run.spec, stage.environ
    namespace = environ.get("DAGGER_SANDBOX_NAMESPACE") or spec.sandbox.namespace
    helper_image = environ.get("DAGGER_HELPER_IMAGE") or spec.sandbox.helper_image
    if not namespace or not helper_image:
        missing = "namespace" if not namespace else "helperImage"
        raise StageFailure("NoSandboxes", f"spec.sandbox.{missing} is not set, and the operator has none either: Pod sandboxes need it")
    run_namespace = environ.get("DAGGER_RUN_NAMESPACE") or stage.run.metadata.namespace or "default"
    setting = Setting(
        run=stage.run.metadata.name,
        run_namespace=run_namespace,
        worker=stage.worker,
        # Unchanged when the container restarts, so that the Lease of the previous life is recognised and deleted.
        life=sha256(f"{run_namespace}/{environ.get('DAGGER_POD') or secrets.token_hex()}".encode()).hexdigest()[:8],
        helper_image=helper_image,
        limits=spec.sandbox.limits,
        lifetime_seconds=lifetime_seconds(spec.sandbox, spec.rollouts),
        image=spec.sandbox.image,
        pod=spec.sandbox.pod,
    )
    return PodSandboxes(setting, namespace, most_alive=2 * spec.rollouts.concurrency)


def lifetime_seconds(sandbox: Sandbox, rollouts: Rollouts) -> int:
    """Longest time a sandbox pod may exist, even if forgotten: more than its work may take, since a kubelet that ends it in the midst of
    that looks like an infrastructure failure. The chart's admission policy allows no more than the maximum of this."""
    work = longest_work(
        create_timeout=sandbox.create_timeout_seconds,
        act_timeout=rollouts.timeout_seconds,
        grade_timeout=sandbox.grade_timeout_seconds,
    )
    return work + _SPARE_SECONDS


def gateway_place(stage: Stage) -> GatewayPlace:
    """The loopback address, except for command scaffolds in pods: they reach it through their helper, which forwards to this pod."""
    if stage.run.spec.scaffold.type is not ScaffoldType.COMMAND or not in_pods(stage):
        return {}
    if not (address := stage.environ.get("POD_IP")):
        raise StageFailure("NoPodAddress", "POD_IP is not set: command scaffolds in pods reach the gateway at the worker's address")
    return {"host": address, "port": GATEWAY_PORT, "advertise": "127.0.0.1"}
