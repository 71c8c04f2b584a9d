"""The common interface of all sandboxes."""

from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self


class SandboxError(Exception):
    """Infrastructure broke a sandbox: it could not be created, or was lost. Except for `LimitExceeded` it is never caused by the agent,
    and it is never an observation."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


class LimitExceeded(SandboxError):
    """What ran in a sandbox exceeded its limits, so all of it was stopped: no infrastructure broke."""


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    output: str
    """Standard output and error in the order they were written; over the limit, the middle is cut out."""
    returncode: int
    """Exit code; 124 if it missed its deadline, 137 if it was killed by a limit."""
    timed_out: bool = False
    truncated: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class SandboxRequest:
    """The sandbox that a rollout asks for."""

    name: str
    """Unique among live sandboxes; composed of run, round, rollout and try."""
    image: str | None = None
    """Container image; ignored by process sandboxes."""
    workdir: str = "/testbed"
    """Working directory of commands."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files by path relative to `workdir`, written before the first command."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment apart from PATH, HOME and LANG: nothing is inherited."""
    network_to: str | None = None
    """The only address (host:port) that commands may reach, as `127.0.0.1:port`; None: no network at all."""


class Sandbox(Protocol):
    """A live sandbox. Every method raises `SandboxError` if the sandbox itself is gone or broken."""

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        """Run a shell command in `workdir`; a missed deadline is a result (124), and kills everything the command started."""
        ...

    async def write(self, files: dict[str, str]) -> None:
        """Write text files by path relative to `workdir` (absolute paths as they are)."""
        ...

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        """Return a file's first `limit` bytes, or None if there is no file."""
        ...

    async def close(self) -> None:
        """Kill what runs and remove everything; may be called twice."""
        ...


class SandboxProvider(Protocol):
    """Creates sandboxes of one kind."""

    async def create(self, request: SandboxRequest, *, timeout: float) -> Sandbox:
        """Create a sandbox that is ready for commands within `timeout` seconds, or raise `SandboxError`."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...
