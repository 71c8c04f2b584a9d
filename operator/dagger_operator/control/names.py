"""Names, labels and annotations of everything a run owns. All object names are made here."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagger_operator.api import DAggerRun, Role

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY_VALUE = "dagger-operator"
RUN = "dagger-operator.dev/run"
COMPONENT = "dagger-operator.dev/component"
ROUND = "dagger-operator.dev/round"
ATTEMPT = "dagger-operator.dev/attempt"
RUN_NAMESPACE = "dagger-operator.dev/run-namespace"
"""Label of a run's objects in a namespace other than its own."""

RETRY = "dagger-operator.dev/retry"
"""Annotation of a run. A new value makes new attempts: `daggerctl resume` of a failed run changes it."""
FAILED = "dagger-operator.dev/failed"
"""Annotation of a Job or server that was given up: reason and message as JSON. It is the lasting sign that this attempt failed, where the
object itself would not show it."""

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Label of an Indexed Job's pods."""


@dataclass(frozen=True, order=True)
class Ref:
    """Reference to one object in the run's namespace."""

    api_version: str
    kind: str
    name: str
    uid: str = ""
    """Precondition of a deletion; empty if the object was never observed."""


def labels(run: DAggerRun, component: str, round_number: int, attempt: str) -> dict[str, str]:
    return {
        MANAGED_BY: MANAGED_BY_VALUE,
        RUN: run.metadata.name,
        COMPONENT: str(component),
        ROUND: str(round_number),
        ATTEMPT: attempt,
    }


def round_of(labels: Mapping[str, str]) -> int:
    """Return the round stated by labels; 0 if they state none or an invalid one, since anybody may write them."""
    said = labels.get(ROUND, "")
    return int(said) if said.isascii() and said.isdigit() else 0


def server_name(run: DAggerRun, role: Role) -> str:
    """Return the name of a policy's headless Service, and of its Deployment."""
    return f"{run.metadata.name}-{role}"


def group_name(run: DAggerRun, role: Role) -> str:
    """Return the name of a policy's LeaderWorkerSet. Its controller gives the same name to the headless Service by which the nodes of a
    replica find each other before any of them is ready, so it must differ from that of our own Service."""
    return f"{server_name(run, role)}-group"


def job_name(run: DAggerRun, stage: str, round_number: int, attempt: str) -> str:
    """Return the name of a Job: at most 58 characters, so that `<job>-<index>` is a host name: run 32, round 4, stage 10, attempt 8,
    separators."""
    return f"{run.metadata.name}-r{round_number:03d}-{stage}-{attempt}"


def attempt_of(run: DAggerRun, what_runs: Mapping[str, Any]) -> str:
    """Return the first 8 digits of a hash of what runs and of the retry annotation: the same inputs make the same object."""
    key = {"runs": what_runs, "retry": run.metadata.annotations.get(RETRY, "")}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
