"""A run's children, in the few words that the plan decides by."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from dagger_operator.control.names import Ref


class ChildState(StrEnum):
    WAITING = "Waiting"
    """Nothing of it runs yet."""
    RUNNING = "Running"
    """A Job whose pods run; a server that is on its way."""
    READY = "Ready"
    """A server with all replicas ready; anything else that exists."""
    SUSPENDED = "Suspended"
    """A suspended Job; a server scaled to zero."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class Trouble:
    """Why something waits or failed, in the words of the one who knows."""

    reason: str
    message: str = ""
    since: datetime | None = None


@dataclass(frozen=True)
class PodFailure:
    """How one pod of a Job, or a container of a server, ended. It is known as long as the pod is there, which is as long as its Job is."""

    reason: str
    message: str
    exit_code: int | None = None
    disrupted: bool = False
    """Evicted, preempted, or its node went away."""
    index: str = ""
    """Completion index of the pod, by which the one that takes its place is known."""


SERVERS = frozenset({"Deployment", "LeaderWorkerSet"})
"""Kinds that serve a policy."""

_AT_REST = {
    "Job": frozenset({ChildState.SUCCEEDED, ChildState.FAILED}),
    **dict.fromkeys(SERVERS, frozenset({ChildState.SUSPENDED, ChildState.FAILED})),
}


@dataclass(frozen=True)
class Child:
    """One object of a run, or pods whose object is gone."""

    kind: str
    name: str
    component: str
    round: int = 0
    attempt: str = ""
    state: ChildState = ChildState.READY
    pods: int = 0
    """Pods that exist and have not ended, terminating ones included: they may hold GPUs."""
    trouble: Trouble | None = None
    waiting_since: datetime | None = None
    """Since when something of it waits to run; None where nothing does, or where it waits in a queue."""
    lost: Trouble | None = None
    """That a pod of it, of whatever attempt, should have gone, and its node does not say that it did: what it holds it holds until then."""
    failures: tuple[PodFailure, ...] = ()
    """Of a Job: its pods that failed, oldest first. Of a server: the ends, one for each start, of a container that lacks a service."""
    finished: datetime | None = None
    """When a Job ended."""
    api_version: str = ""
    uid: str = ""
    deleting: bool = False

    @property
    def holds(self) -> bool:
        """Whether it has pods, or may be given some at any moment by the controller that works on it."""
        return self.pods > 0 or (self.kind in _AT_REST and self.state not in _AT_REST[self.kind])

    @property
    def ref(self) -> Ref:
        return Ref(self.api_version, self.kind, self.name, self.uid)
