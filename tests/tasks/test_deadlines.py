"""How long a sandbox may be in use, by the deadlines that its steps are really given."""

from typing import Any

import pytest

from dagger_operator.api import Rollouts
from dagger_operator.api import Sandbox as SandboxSettings
from dagger_operator.rollout.sandboxes import lifetime_seconds
from dagger_operator.sandbox.interface import CommandResult, Sandbox, SandboxRequest
from dagger_operator.tasks.grading import grade, longest_work
from dagger_operator.tasks.task import ScriptGrading, Task
from dagger_operator.tasks.workspace import collect_patch, start

TASK = Task(id="t", statement="s", setup="true", grading=ScriptGrading(files={"hidden.py": "1"}, command="python3 hidden.py"))
CREATE, ACT, GRADE = 7, 11, 13


class Slow:
    """A sandbox, and its provider, in which every step takes all its time; a patch is not UTF-8 at first."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._patches = [b"\xff", b"diff"]

    async def create(self, request: SandboxRequest, *, timeout: float) -> Sandbox:
        self.seconds += timeout
        return self

    async def execute(self, command: str, *, timeout: float, env: dict[str, str] | None = None) -> CommandResult:
        self.seconds += timeout
        return CommandResult("", 0)

    async def write(self, files: dict[str, str]) -> None: ...

    async def read(self, path: str, *, limit: int = 1 << 20) -> bytes | None:
        return self._patches.pop(0)

    async def close(self) -> None: ...

    async def __aenter__(self) -> "Slow":
        return self

    async def __aexit__(self, *_: object) -> None: ...


async def acting() -> float:
    sandbox = Slow()
    workspace = await start(TASK, sandbox, name="agent", timeout=CREATE)
    await collect_patch(workspace)
    return sandbox.seconds


async def grading(timeout: float) -> float:
    sandbox = Slow()
    await grade(TASK, "diff", sandbox, name="grade", create_timeout=CREATE, timeout=timeout)
    return sandbox.seconds


async def test_the_longest_work_of_a_sandbox_is_the_sum_of_the_deadlines_of_its_steps() -> None:
    assert longest_work(create_timeout=CREATE, act_timeout=ACT, grade_timeout=1) == ACT + await acting()
    assert longest_work(create_timeout=CREATE, act_timeout=1, grade_timeout=1000) == await grading(1000)


@pytest.mark.parametrize(("act", "check"), [(ACT, GRADE), (1, 4000), (100_000, 1)])
async def test_no_pod_is_ended_while_its_work_may_go_on(act: int, check: int) -> None:
    settings: Any = {"create_timeout_seconds": CREATE, "grade_timeout_seconds": check}
    life = lifetime_seconds(SandboxSettings(**settings), Rollouts(timeout_seconds=act))
    assert life >= max(act + await acting(), await grading(check)) + 600, "and files take time, too"
