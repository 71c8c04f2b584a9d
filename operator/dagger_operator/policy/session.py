"""What a worker hands the gateway for one rollout, and what it gets back."""

from dataclasses import dataclass
from typing import Protocol

from dagger_operator.api import LabelMode, Mixing, Role
from dagger_operator.store.records import Failure, Message, Turn


class LabelCheck(Protocol):
    """Whether a teacher's message can be parsed by the scaffold: None, or what is wrong with it."""

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
    """Turns after which the gateway refuses further ones (409) and the session ends as LimitReached."""
    label_check: LabelCheck
    mixing: Mixing | None
    """None is evaluation: the student alone, greedy, no labels."""
    labels: LabelMode = LabelMode.ASYNC


@dataclass(frozen=True)
class Silence:
    """A policy that was asked to act and had not answered when the session was closed."""

    actor: Role
    seconds: float
    """Since it was asked, or since it last streamed a part of its answer."""


@dataclass(frozen=True)
class Recording:
    """What a session saw."""

    turns: tuple[Turn, ...]
    kappa: int | None
    failure: Failure | None
    """Set where a policy could not be reached or mixed: the rollout is an infrastructure failure, whatever the scaffold made of it."""
    policy_error: Failure | None
    """Set where a policy itself could not go on: with a context that is too long for it, where the agent did not ask again with less."""
    limit_reached: bool
    acting_seconds: float
    label_seconds: float
    silence: Silence | None = None
    """Set where a turn was under way that nobody will execute."""


class Session(Protocol):
    """An open rollout at the gateway."""

    base_url: str
    """OpenAI base URL of this rollout, on the loopback address (the advertised one where sandboxes call it)."""
    token: str
    """Bearer token that opens this rollout and no other; unpredictable, never stored."""

    async def finish(self) -> Recording:
        """Waits for outstanding labels (asks for all of them where they are deferred), closes, and returns the record."""
        ...

    async def abort(self) -> None:
        """Drops the session and cancels its upstream requests."""
        ...
