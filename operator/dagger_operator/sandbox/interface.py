"""The one interface of all sandboxes."""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self


class SandboxError(Exception):
    """Infrastructure broke a sandbox: it could not be made, or was lost. Never the agent's doing, but for `LimitExceeded`; never an
    observation."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


class LimitExceeded(SandboxError):
    """What ran in a sandbox exceeded its limits, and all of it was ended for that: no infrastructure broke."""


@dataclass(frozen=True)
class CommandResult:
    """What a command left."""

    output: str
    """Standard output and error in the order they were written, the middle cut out where it was over the limit."""
    returncode: int
    """Exit code; 124 where the deadline was missed, 137 where a limit killed it."""
    timed_out: bool = False
    truncated: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class SandboxRequest:
    """What a rollout asks for."""

    name: str
    """Unique among live sandboxes; run, round, rollout and try make it up."""
    image: str | None = None
    """Container image; process sandboxes have none."""
    workdir: str = "/testbed"
    """Where commands start."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files by path relative to `workdir`, there before the first command."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment beside PATH, HOME, LANG: nothing is inherited."""
    network_to: str | None = None
    """The only address (host:port) that commands may reach, as `127.0.0.1:port`; None is no network at all."""


class Sandbox(Protocol):
    """A live sandbox. Every method raises `SandboxError` where the sandbox itself is gone or broken."""

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        """Runs a shell command in `workdir`; a missed deadline is a result (124), and kills everything it started."""
        ...

    async def write(self, files: dict[str, str]) -> None:
        """Writes text files by path relative to `workdir` (absolute paths as they are)."""
        ...

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """A file's first `limit` bytes, or None where there is none."""
        ...

    async def close(self) -> None:
        """Kills what runs and removes everything; may be called twice."""
        ...


class SandboxProvider(Protocol):
    """Makes sandboxes of one kind."""

    async def create(self, request: SandboxRequest, *, timeout: float) -> Sandbox:
        """Makes a sandbox ready for commands within `timeout` seconds, or raises `SandboxError`."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
