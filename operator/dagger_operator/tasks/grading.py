"""Decides whether a patch resolves its task: in a fresh sandbox, by a check that the agent never saw.

The sandbox in which the agent worked is never graded. Only its patch is carried over, so that nothing else it did (a changed
interpreter, a rewritten test, a process left behind) counts, and the check's files are written last, over whatever the patch put there.
"""

import asyncio
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from dagger_operator.sandbox.interface import LimitExceeded, SandboxProvider
from dagger_operator.tasks import swebench
from dagger_operator.tasks.task import ScriptGrading, SwebenchGrading, Task
from dagger_operator.tasks.workspace import COLLECT_STEPS, NO_PATCH, PATCH_SECONDS, START_STEPS, Workspace, apply_patch, start

_LOG_CHARS = 4000
_CHECK_STEPS = 2
"""Commands with the check's deadline: making way for its files, and the check."""


@dataclass(frozen=True)
class Grade:
    """A verdict. An infrastructure failure is not a verdict: it raises `SandboxError`."""

    resolved: bool
    returncode: int | None
    """Exit code of the check; None if no patch applied, or if what ran exceeded the sandbox's limits."""
    log: str
    """The end of the check's output."""


def longest_work(*, create_timeout: int, act_timeout: int, grade_timeout: int) -> int:
    """Return for how many seconds the deadlines allow a sandbox to be in use, by an agent or by a grade, if every step takes all its time.

    The time that files and connections take in between is not included.
    """
    acting = act_timeout + COLLECT_STEPS * PATCH_SECONDS
    grading = PATCH_SECONDS + _CHECK_STEPS * grade_timeout
    return START_STEPS * create_timeout + max(acting, grading)


async def grade(task: Task, patch: str, provider: SandboxProvider, *, name: str, create_timeout: float, timeout: float) -> Grade:
    """Grade a patch from `collect_patch`. `timeout` is the deadline of the check; exceeding it, or the sandbox's limits, counts as
    unresolved. `longest_work` says how long all of it may take.

    Raises `SandboxError` if the sandbox is at fault.
    """
    if patch.startswith(NO_PATCH):
        return Grade(False, None, patch)
    workspace = await start(task, provider, name=name, timeout=create_timeout)
    try:
        if isinstance(task.grading, SwebenchGrading):
            return await _by_swebench(workspace, task.grading, patch, timeout)
        return await _by_script(workspace, task.grading, patch, timeout)
    except LimitExceeded as error:
        return Grade(False, None, str(error))
    finally:
        await workspace.sandbox.close()


async def _by_script(workspace: Workspace, grading: ScriptGrading, patch: str, timeout: float) -> Grade:
    applied = await apply_patch(workspace, patch)
    if applied.returncode != 0:
        return Grade(False, None, applied.output[-_LOG_CHARS:])
    if grading.files:
        await workspace.sandbox.execute(_make_way(grading.files), timeout=timeout)
        await workspace.sandbox.write(grading.files)
    done = await workspace.sandbox.execute(grading.command, timeout=timeout)
    return Grade(done.returncode == 0, done.returncode, done.output[-_LOG_CHARS:])


def _make_way(paths: Iterable[str]) -> str:
    """Return a command that removes whatever a patch put where the check's files go: folders, links, and files in place of folders."""
    lines: list[str] = []
    for path in paths:
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            folder = shlex.quote(str(parent))
            lines.append(f"[ -d {folder} ] && [ ! -L {folder} ] || rm -f -- {folder}")
        lines.append(f"rm -rf -- {shlex.quote(path)}")
    return "\n".join(lines)


async def _by_swebench(workspace: Workspace, grading: SwebenchGrading, patch: str, timeout: float) -> Grade:
    applied = await apply_patch(workspace, patch, swebench.APPLY)
    if applied.returncode != 0:
        return Grade(False, None, applied.output[-_LOG_CHARS:])
    ran = await swebench.evaluate(workspace.sandbox, grading.row, timeout=timeout)
    if ran.timed_out:
        return Grade(False, ran.returncode, ran.log[-_LOG_CHARS:])
    resolved = await asyncio.to_thread(swebench.judge, grading.row, patch, ran.log)
    return Grade(resolved, ran.returncode, ran.log[-_LOG_CHARS:])
