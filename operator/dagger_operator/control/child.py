"""A run's children, reduced to what the plan needs for its decisions."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from dagger_operator.control.names import Ref


class ChildState(StrEnum):
    WAITING = "Waiting"
    """None of its pods runs yet."""
    RUNNING = "Running"
    """A Job whose pods run; a server that is starting."""
    READY = "Ready"
    """A server with all replicas ready; anything else that exists."""
    SUSPENDED = "Suspended"
    """A suspended Job; a server scaled to zero."""
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True)
class Trouble:
    """Why something waits or failed, in the words of its source."""

    reason: str
    message: str = ""
    since: datetime | None = None


@dataclass(frozen=True)
class PodFailure:
    """How one pod of a Job, or a container of a server, ended. It is known as long as the pod exists, which is as long as its Job
    exists."""

    reason: str
    message: str
    exit_code: int | None = None
    disrupted: bool = False
    """Evicted, preempted, or its node is gone."""
    index: str = ""
    """Completion index of the pod, which identifies its replacement."""
    at: datetime | None = None
    """When it ended; None if that is not known."""


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
    """Pods that exist and have not ended, including terminating ones: they may hold GPUs."""
    trouble: Trouble | None = None
    waiting_since: datetime | None = None
    """Since when one of its pods has been waiting to run; None if none is, or if it waits in a queue."""
    lost: Trouble | None = None
    """Set if one of its pods, of any attempt, should be gone but its node does not confirm that: until then the pod keeps its resources."""
    unplaced: Trouble | None = None
    """For a server: why a pod of it has no node: no room, a queue, a quota, or a lost node. Nothing that the run does changes that."""
    placed: datetime | None = None
    """For a server: since when all its pods have had their nodes; None while one lacks it."""
    failures: tuple[PodFailure, ...] = ()
    """For a Job: its failed pods, oldest first. For a server: one entry per start of a container that ended for lack of a service."""
    finished: datetime | None = None
    """When a Job ended."""
    api_version: str = ""
    uid: str = ""
    deleting: bool = False

    @property
    def holds(self) -> bool:
        """Whether it has pods, or its controller may create some at any moment."""
        return self.pods > 0 or (self.kind in _AT_REST and self.state not in _AT_REST[self.kind])

    @property
    def ref(self) -> Ref:
        return Ref(self.api_version, self.kind, self.name, self.uid)
