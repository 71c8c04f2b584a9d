"""Names, labels and annotations of everything a run owns. Nowhere else is an object's name made."""

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
"""Label of what a run has in another namespace than its own."""

RETRY = "dagger-operator.dev/retry"
"""Annotation of a run. A new value makes new attempts: `daggerctl resume` of a failed run bumps it."""
FAILED = "dagger-operator.dev/failed"
"""Annotation of a Job or server that was given up: reason and message as JSON. It is the lasting sign that this attempt failed,
where the object itself would not show it."""

COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
"""Label of an Indexed Job's pods."""


@dataclass(frozen=True, order=True)
class Ref:
    """Points at one object in the run's namespace."""

    api_version: str
    kind: str
    name: str
    uid: str = ""
    """Precondition of a deletion; empty where the object was never observed."""


def labels(run: DAggerRun, component: str, round_number: int, attempt: str) -> dict[str, str]:
    return {
        MANAGED_BY: MANAGED_BY_VALUE,
        RUN: run.metadata.name,
        COMPONENT: str(component),
        ROUND: str(round_number),
        ATTEMPT: attempt,
    }


def round_of(labels: Mapping[str, str]) -> int:
    """The round that labels tell of; 0 where they tell of none, since anybody may write them."""
    said = labels.get(ROUND, "")
    return int(said) if said.isascii() and said.isdigit() else 0


def server_name(run: DAggerRun, role: Role) -> str:
    """Name of a policy's headless Service, and of its Deployment."""
    return f"{run.metadata.name}-{role}"


def group_name(run: DAggerRun, role: Role) -> str:
    """Name of a policy's LeaderWorkerSet, and of the headless Service that its controller makes for it, by which the nodes of a replica
    find each other before any of them is ready: hence not the name of our own."""
    return f"{server_name(run, role)}-group"


def job_name(run: DAggerRun, stage: str, round_number: int, attempt: str) -> str:
    """At most 58 characters, so that `<job>-<index>` is a host name: run 32, round 4, stage 10, attempt 8, separators."""
    return f"{run.metadata.name}-r{round_number:03d}-{stage}-{attempt}"


def attempt_of(run: DAggerRun, what_runs: Mapping[str, Any]) -> str:
    """First 8 digits of a hash of what runs and of the retry annotation: the same inputs make the same object."""
    key = {"runs": what_runs, "retry": run.metadata.annotations.get(RETRY, "")}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
