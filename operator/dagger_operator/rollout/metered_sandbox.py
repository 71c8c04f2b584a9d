"""A sandbox that measures how many seconds its commands take."""

from prometheus_client import Histogram

from dagger_operator.sandbox.interface import CommandResult, Sandbox


class MeteredSandbox:
    """Wraps a `Sandbox` and behaves like it."""

    def __init__(self, sandbox: Sandbox, histogram: Histogram) -> None:
        self._sandbox, self._histogram = sandbox, histogram
        self.command_seconds = 0.0

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        result = await self._sandbox.execute(command, timeout=timeout, env=env)
        self.command_seconds += result.seconds
        self._histogram.observe(result.seconds)
        return result

    async def write(self, files: dict[str, str]) -> None:
        await self._sandbox.write(files)

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        return await self._sandbox.read(path, limit=limit)

    async def close(self) -> None:
        await self._sandbox.close()
