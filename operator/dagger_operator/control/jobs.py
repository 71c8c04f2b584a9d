"""Jobs: one for each stage of each round."""

import json
from dataclasses import dataclass
from typing import Any

from dagger_operator.api import DAggerRun, PodSettings, Role
from dagger_operator.api.ports import GATEWAY_PORT, METRICS_PORT, TORCH_PORT
from dagger_operator.control.child import Trouble
from dagger_operator.control.failures import retry_settings
from dagger_operator.control.identity import sandbox_namespace, worker_account
from dagger_operator.control.names import COMPLETION_INDEX, FAILED, attempt_of, job_name, labels
from dagger_operator.control.pods import (
    SCRATCH,
    TRAINER_IMAGE,
    WORKER_IMAGE,
    container,
    from_field,
    own_environment,
    own_secrets,
    owned,
    pod_spec,
    policy_environment,
    value,
)
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import StageName, Step
from dagger_operator.control.scheduling import pod_template, queue_labels

INDEX = f"metadata.annotations['{COMPLETION_INDEX}']"


@dataclass(frozen=True)
class _Shape:
    """What a stage's Job looks like."""

    module: str
    roles: tuple[Role, ...] = ()
    """Policies that it queries."""
    cpu: str = "100m"
    memory: str = "256Mi"
    ports: tuple[tuple[str, int], ...] = ()


_METRICS = (("metrics", METRICS_PORT),)
_WORKER = (*_METRICS, ("gateway", GATEWAY_PORT))
_SHAPES: dict[StageName, _Shape] = {
    StageName.PREPARE: _Shape("dagger_operator.serving.prepare", memory="1Gi"),
    StageName.PREFLIGHT: _Shape("dagger_operator.serving.preflight", (Role.STUDENT, Role.TEACHER)),
    StageName.ROLLOUT: _Shape("dagger_operator.rollout", (Role.STUDENT, Role.TEACHER), cpu="1", memory="2Gi", ports=_WORKER),
    StageName.TRAINING: _Shape("dagger_operator.training", cpu="1", memory="4Gi", ports=_METRICS),
    StageName.PUBLISH: _Shape("dagger_operator.serving.publish", (Role.STUDENT,)),
    # No teacher: the student is evaluated alone, and a Job has no Secret that it does not need.
    StageName.EVALUATION: _Shape("dagger_operator.evaluation", (Role.STUDENT,), cpu="1", memory="2Gi", ports=_WORKER),
}


def build_job(run: DAggerRun, step: Step, results: Results, *, suspend: bool = False, given_up: Trouble | None = None) -> dict[str, Any]:
    """Return the Job of a step, Indexed, with a pod for each worker or node. `given_up` ends it for good and records why.

    Its attempt is a hash of its spec: a Job's spec is immutable, so another spec is another Job.
    """
    spec = _job_spec(run, step, results)
    queue = queue_labels(run.spec.kueue)
    attempt = attempt_of(run, {**spec, "queue": queue} if queue else spec)
    own = labels(run, step.stage, step.round, attempt)
    name = job_name(run, step.stage, step.round, attempt)
    spec["template"]["metadata"]["labels"] |= own
    if step.stage is StageName.TRAINING and run.spec.training.nodes > 1:
        # Nodes find the first one by its host name below the Service; both contain the attempt, so they are added only now.
        spec["template"]["spec"]["subdomain"] = training_service_name(run)
        address = f"{name}-0.{training_service_name(run)}.{run.metadata.namespace}.svc"
        spec["template"]["spec"]["containers"][0]["env"].append(value("DAGGER_MASTER_ADDR", address))
    annotations = None
    if given_up is not None:
        annotations = {FAILED: json.dumps({"reason": given_up.reason, "message": given_up.message})}
        spec["activeDeadlineSeconds"] = 1
    if (suspend or given_up is not None) and run.spec.kueue is None:
        # Left out otherwise: Kueue sets this field on the Jobs that it admits, and a field that is not applied causes no conflict.
        spec["suspend"] = True
    return {**owned(run, "batch/v1", "Job", name, own | queue, annotations), "spec": spec}


def training_service_name(run: DAggerRun) -> str:
    return f"{run.metadata.name}-training"


def build_training_service(run: DAggerRun) -> dict[str, Any]:
    """Return the Service that gives host names to the pods of a training Job with several nodes."""
    own = labels(run, StageName.TRAINING, 0, "")
    selector = {key: own[key] for key in own if own[key] and not key.endswith("/round")}
    return {
        **owned(run, "v1", "Service", training_service_name(run), own),
        # Ranks connect before any of them is ready.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [{"name": "torch", "port": TORCH_PORT}],
        },
    }


def _job_spec(run: DAggerRun, step: Step, results: Results) -> dict[str, Any]:
    pods = pods_of(run, step.stage)
    return {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        **retry_settings(run, step.stage, pods),
        # A worker's name is its index: no second worker starts before the first has ended.
        "podReplacementPolicy": "Failed",
        "template": _template(run, step, results),
    }


def pods_of(run: DAggerRun, stage: StageName) -> int:
    """Return the number of pods of a stage's Job."""
    if stage is StageName.TRAINING:
        return run.spec.training.nodes
    return run.spec.rollouts.workers if stage in (StageName.ROLLOUT, StageName.EVALUATION) else 1


def _template(run: DAggerRun, step: Step, results: Results) -> dict[str, Any]:
    settings = _settings(run, step.stage)
    served = (run.spec.student.served, run.spec.teacher.serving)
    # Weights on a claim are read both where the first policy is prepared and where it is served.
    claims = [claim for one in served if one is not None for claim in one.pod.claims] if step.stage is StageName.PREPARE else []
    template = pod_template({}, _pod(run, step, results), settings, main="stage", claims=claims)
    if sandbox_namespace(run, step.stage) is not None:
        template["spec"] |= {"serviceAccountName": worker_account(run), "automountServiceAccountToken": True}
    return template


def _settings(run: DAggerRun, stage: StageName) -> PodSettings:
    return run.spec.training.pod if stage is StageName.TRAINING else run.spec.rollouts.pod


def _pod(run: DAggerRun, step: Step, results: Results) -> dict[str, Any]:
    shape, training, settings = _SHAPES[step.stage], step.stage is StageName.TRAINING, _settings(run, step.stage)
    env = [
        *own_environment(run, settings, step.stage),
        value("DAGGER_ROUND", step.round),
        from_field("JOB_COMPLETION_INDEX", INDEX),
        value("DAGGER_WORKER", f"{step.stage}-$(JOB_COMPLETION_INDEX)"),
        *policy_environment(run, shape.roles),
    ]
    policy = results.student_after(step.round)  # in rollouts, that of the previous round: this round's is not trained yet
    if policy is not None and step.stage in (StageName.ROLLOUT, StageName.PUBLISH, StageName.EVALUATION):
        env.append(value("DAGGER_POLICY", policy))
    if training and run.spec.training.nodes > 1:
        env.append(value("DAGGER_MASTER_PORT", TORCH_PORT))
    if shape.ports:
        env.append(value("DAGGER_METRICS_PORT", METRICS_PORT))
    if (namespace := sandbox_namespace(run, step.stage)) is not None:
        env += [value("DAGGER_SANDBOX_NAMESPACE", namespace), from_field("DAGGER_RUN_NAMESPACE", "metadata.namespace")]
        if run.spec.sandbox.helper_image is not None:
            env.append(value("DAGGER_HELPER_IMAGE", run.spec.sandbox.helper_image))
    stage = container(
        "stage",
        (run.spec.training.image or TRAINER_IMAGE) if training else (run.spec.image or WORKER_IMAGE),
        ["python", "-m", shape.module],
        env,
        env_from=own_secrets(run, settings),
        mounts=[("scratch", SCRATCH), *([("shm", "/dev/shm")] if training else [])],  # noqa: S108 - a mount of the pod's own
        gpus=run.spec.training.gpus_per_node if training else 0,
        requests={"cpu": shape.cpu, "memory": shape.memory},
        **({"ports": [{"name": name, "containerPort": port} for name, port in shape.ports]} if shape.ports else {}),
    )
    return pod_spec(
        [stage],
        volumes=["scratch"],
        memory_volumes=["shm"] if training else [],
        restartPolicy="Never",
        # Time for a trainer to store a checkpoint, and for a worker to release its claims.
        terminationGracePeriodSeconds=run.spec.training.termination_grace_period_seconds if training else 60,
    )
