"""The command scaffold: any program that uses an OpenAI endpoint, run inside the sandbox."""

import shlex
from dataclasses import dataclass

from dagger_operator.policy.session import Session
from dagger_operator.rollout.scaffold import DEADLINE, SUBMITTED, ScaffoldEnd
from dagger_operator.sandbox.interface import Sandbox
from dagger_operator.tasks.task import Task


@dataclass(frozen=True)
class CommandScaffold:
    """Runs the program once; exit code 0 counts as a submission."""

    command: tuple[str, ...]
    timeout: float
    """Seconds."""

    async def __call__(self, task: Task, sandbox: Sandbox, session: Session) -> ScaffoldEnd:
        ours = {"OPENAI_BASE_URL": session.base_url, "OPENAI_API_KEY": session.token, "DAGGER_TASK_STATEMENT": task.statement}
        result = await sandbox.execute(shlex.join(self.command), timeout=self.timeout, env={**task.env, **ours})
        if result.timed_out:
            return ScaffoldEnd(DEADLINE)
        return ScaffoldEnd(SUBMITTED) if result.returncode == 0 else ScaffoldEnd(f"ExitCode{result.returncode}", result.output[-2000:])
