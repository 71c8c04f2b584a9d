"""What a worker gives the gateway for one rollout, and what it gets back."""

from dataclasses import dataclass
from typing import Protocol

from dagger_operator.api import LabelMode, Mixing, Role
from dagger_operator.store.records import Failure, Message, Turn


class LabelCheck(Protocol):
    """Checks whether the scaffold can parse a teacher's message: None, or what is wrong with it."""

    def __call__(self, message: Message) -> str | None: ...


@dataclass(frozen=True)
class SessionRequest:
    """One rollout."""

    seed: int
    round: int
    rollout_id: str
    task_id: str
    student: str
    """Policy version that must act as student."""
    max_turns: int
    """Number of turns after which the gateway refuses further ones (409) and the session ends as LimitReached."""
    label_check: LabelCheck
    mixing: Mixing | None
    """None in evaluation: the student alone, greedy, no labels."""
    labels: LabelMode = LabelMode.ASYNC


@dataclass(frozen=True)
class Silence:
    """A policy that was asked to act and had not answered when the session was closed."""

    actor: Role
    seconds: float
    """Seconds since it was asked, or since it last streamed part of its answer."""


@dataclass(frozen=True)
class Recording:
    """What a session recorded."""

    turns: tuple[Turn, ...]
    kappa: int | None
    failure: Failure | None
    """Set if a policy could not be reached or mixed: the rollout is an infrastructure failure, whatever the scaffold made of it."""
    policy_error: Failure | None
    """Set if a policy itself could not continue; for a context that is too long, only if the agent did not retry with a shorter one."""
    limit_reached: bool
    acting_seconds: float
    label_seconds: float
    silence: Silence | None = None
    """Set if a turn was in progress that nobody will execute."""


class Session(Protocol):
    """A rollout's open session at the gateway."""

    base_url: str
    """OpenAI base URL of this rollout, on the loopback address (or on the advertised one, if sandboxes call it)."""
    token: str
    """Bearer token, valid for this rollout only; unpredictable, never stored."""

    async def finish(self) -> Recording:
        """Close, wait for outstanding labels (deferred ones are requested now), and return the record."""
        ...

    async def abort(self) -> None:
        """Close the session and cancel its upstream requests."""
        ...
