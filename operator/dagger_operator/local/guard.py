"""Outlives a supervisor that was killed, for as long as it takes to stop what that supervisor had started.

`python -m dagger_operator.local.guard MARK LOGS` waits until its standard input closes, which happens however the supervisor ends.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Self

from dagger_operator.local.processes import Reach, reap


class Guard:
    """The guard process, as the supervisor handles it. Use as an async context manager."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    async def __aenter__(self) -> Self:
        command = [sys.executable, "-m", "dagger_operator.local.guard", self._reach.mark, str(self._reach.logs)]
        # In its own session: Ctrl-C is for the supervisor only.
        self._process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, start_new_session=True)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


def main(mark: str, logs: str) -> None:
    sys.stdin.read()
    # The next supervisor may start at once; leave what it starts alone.
    reap(Reach(mark, Path(logs)), older_than=time.time())


if __name__ == "__main__":
    main(*sys.argv[1:])
