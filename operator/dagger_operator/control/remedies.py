"""Which field of a run asked for something that its pod does not get. Kubelet and scheduler name what is missing, but know nothing of
runs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dagger_operator.api import Role
from dagger_operator.control.child import Trouble
from dagger_operator.control.names import COMPONENT
from dagger_operator.control.rounds import StageName

SAID_LIMIT = 600
"""Maximum characters of a quoted message: this leaves room for the rest of a condition's message, the remedy and the time."""

_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"})


def explained(pod: Mapping[str, Any], reason: str, said: str, container: str = "") -> str:
    """Return a message about a pod, preceded by the field to look at and followed by what to write, if known."""
    said = f"pod {pod['metadata']['name']}: {shortened(said)}"
    component = (pod["metadata"].get("labels") or {}).get(COMPONENT, "")
    settings = _settings(component)
    if reason in _IMAGE:
        return f"{_image(component, container)}: {said}: name an image that the nodes can pull, or give {settings}.imagePullSecrets"
    if reason == "Unschedulable":
        fields = (*_gpus(component), f"{settings}.resources", f"{settings}.nodeSelector, tolerations and affinity")
        return f"{said}: ask for what some node has to give: {', '.join(fields)}"
    if reason == "CreateContainerConfigError":
        return f"{said}: {_secrets(component, container)}"
    return said


def shortened(said: str) -> str:
    return said if len(said) <= SAID_LIMIT else said[:SAID_LIMIT] + "..."


def within_quota(trouble: Trouble, component: str) -> Trouble:
    """Return the trouble with the fields to change if a quota of the namespace is used up."""
    if trouble.reason != "QuotaExceeded":
        return trouble
    fields = (*_numbers(component), *_gpus(component), f"{_settings(component)}.resources")
    return replace(trouble, message=f"{trouble.message}: have the quota raised, or ask for less: {', '.join(fields)}")


def _image(component: str, container: str) -> str:
    """Return what names an image: the run or, if it does not, whoever installed the operator."""
    if container == "vllm":
        return f"spec.{component}.serving.image"
    if component == StageName.TRAINING:
        return "spec.training.image or the chart's runs.trainerImage"
    return "spec.image or the chart's runs.workerImage"


def _settings(component: str) -> str:
    """Return the part of the spec that configures a component's pods."""
    if component in tuple(Role):
        return f"spec.{component}.serving.pod"
    return "spec.training.pod" if component == StageName.TRAINING else "spec.rollouts.pod"


def _gpus(component: str) -> tuple[str, ...]:
    if component in tuple(Role):
        return (f"spec.{component}.serving.gpus",)
    return ("spec.training.gpusPerNode",) if component == StageName.TRAINING else ()


def _numbers(component: str) -> tuple[str, ...]:
    """Return the fields that set how many pods a component has."""
    if component in tuple(Role):
        return (f"spec.{component}.serving.replicas",)
    if component == StageName.TRAINING:
        return ("spec.training.nodes",)
    return ("spec.rollouts.workers",) if component in (StageName.ROLLOUT, StageName.EVALUATION) else ()


def _secrets(component: str, container: str) -> str:
    if container == "vllm":
        return f"create it in the run's namespace; spec.{component}.serving.env names it"
    asks = component in (StageName.PREFLIGHT, StageName.ROLLOUT, StageName.EVALUATION)
    fields = f"spec.storage.secretRef or {_settings(component)}.envFrom"
    fields += " or the secretRef of spec.teacher.endpoint or spec.student.endpoint" if asks else ""
    return f"create it in the run's namespace, with its keys; {fields} names it"
