"""The interface between an attempt and an agent program."""

from dataclasses import dataclass
from typing import Protocol

from dagger_operator.policy.session import Session
from dagger_operator.sandbox.interface import Sandbox
from dagger_operator.tasks.task import Task

DEADLINE = "Deadline"
LIMIT_REACHED = "LimitReached"
SUBMITTED = "Submitted"


@dataclass(frozen=True)
class ScaffoldEnd:
    """How an agent program ended."""

    status: str
    """In its own word; `Submitted` if it declared the work done."""
    submission: str = ""
    """What it submitted, such as a patch."""

    @property
    def submitted(self) -> bool:
        return self.status == SUBMITTED


class ScaffoldProgram(Protocol):
    """An agent program. Raises `SandboxError` if the sandbox broke; gateway failures are read from the recording."""

    async def __call__(self, task: Task, sandbox: Sandbox, session: Session) -> ScaffoldEnd: ...
