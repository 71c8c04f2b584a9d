"""The built-in scaffold: mini-swe-agent beside the sandbox; its model is the policy gateway, its environment the sandbox."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import aiohttp

from dagger_operator.api import Protocol, Scaffold
from dagger_operator.policy.session import Session
from dagger_operator.rollout.actions import parse_commands
from dagger_operator.rollout.bridge import Bridge, in_thread
from dagger_operator.rollout.library import library
from dagger_operator.rollout.scaffold import LIMIT_REACHED, ScaffoldEnd
from dagger_operator.rollout.templates import Templates, templates
from dagger_operator.sandbox.interface import Sandbox
from dagger_operator.store.records import Message
from dagger_operator.tasks.task import Task


class GatewayRefused(Exception):
    """The gateway answered a turn with an error; the session's recording has the cause."""

    def __init__(self, status: int, body: str) -> None:
        self.status = status
        super().__init__(f"HTTP {status}: {body[:500]}")


class GatewayModel:
    """mini-swe-agent's `Model`: one turn is one chat completion of the session."""

    def __init__(self, http: aiohttp.ClientSession, session: Session, bridge: Bridge, protocol: Protocol, words: Templates) -> None:
        self._http, self._session, self._bridge = http, session, bridge
        self._protocol, self._words = protocol, words

    def query(self, messages: list[Message], **_: Any) -> Message:
        choice = self._bridge.call(self._complete(messages))["choices"][0]
        message = {key: value for key, value in choice["message"].items() if value is not None}
        actions = parse_commands(
            message,
            self._protocol,
            self._words.action_regex,
            format_error=self._words.format_error,
            finish_reason=choice.get("finish_reason") or "stop",
        )
        return {**message, "extra": {"actions": actions}}

    async def _complete(self, messages: list[Message]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": "policy", "messages": [{k: v for k, v in m.items() if k != "extra"} for m in messages]}
        if self._protocol is Protocol.TOOL_CALL:
            body["tools"] = [library().bash_tool]
        headers = {"Authorization": f"Bearer {self._session.token}"}
        # No deadline here: the gateway sets one for each request, the attempt one for the rollout.
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._http.post(f"{self._session.base_url}/chat/completions", json=body, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                raise GatewayRefused(response.status, await response.text())
            answer: dict[str, Any] = await response.json()
            return answer

    def format_message(self, **message: Any) -> Message:
        return message

    def format_observation_messages(
        self, message: Message, outputs: list[dict[str, Any]], template_vars: dict[str, Any] | None = None
    ) -> list[Message]:
        rendering = {"outputs": outputs, "observation_template": self._words.observation, "template_vars": template_vars}
        if self._protocol is Protocol.TOOL_CALL:
            return library().observe_tool_calls(actions=message["extra"]["actions"], **rendering)
        return library().observe_text(**rendering)

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return {}

    def serialize(self) -> dict[str, Any]:
        return {}


class SandboxEnvironment:
    """mini-swe-agent's `Environment`: a command is one `execute` of the sandbox. Unlike the library's own environment, it exposes none of
    this process's variables to templates."""

    def __init__(
        self, sandbox: Sandbox, bridge: Bridge, *, workdir: str, env: Mapping[str, str], timeout: float, submit_command: str
    ) -> None:
        self._sandbox, self._bridge, self._timeout, self._workdir, self._env = sandbox, bridge, timeout, workdir, dict(env)
        self._submit_command = submit_command.strip()
        # The library's rule, for any marker: an agent submits with a command whose first output line is the marker that it echoes.
        self._marker = self._submit_command.removeprefix("echo ").strip() if self._submit_command.startswith("echo ") else None

    def execute(self, action: dict[str, Any], cwd: str = "") -> dict[str, Any]:
        command = action["command"]
        if self._marker is None and command.strip() == self._submit_command:
            raise _submitted("")
        result = self._bridge.call(self._sandbox.execute(command, timeout=self._timeout, env=self._env))
        lines = result.output.lstrip().splitlines(keepends=True)
        if result.returncode == 0 and lines and lines[0].strip() == self._marker:
            raise _submitted("" if result.truncated else "".join(lines[1:]))
        why = f"The command was still running after {self._timeout:g} seconds and was killed." if result.timed_out else ""
        return {"output": result.output, "returncode": result.returncode, "exception_info": why}

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return {"cwd": self._workdir, "timeout": self._timeout}

    def serialize(self) -> dict[str, Any]:
        return {}


def _submitted(submission: str) -> Exception:
    extra = {"exit_status": "Submitted", "submission": submission}
    return library().submitted({"role": "exit", "content": submission, "extra": extra})


@dataclass(frozen=True)
class MiniScaffold:
    """Runs `DefaultAgent` in a thread. The gateway limits turns and the attempt limits time; nothing limits cost."""

    scaffold: Scaffold
    words: Templates
    http: aiohttp.ClientSession
    executor: Executor
    command_timeout: float
    """Seconds that one command may take."""
    env: Mapping[str, str]
    """Environment of commands; a task's own variables take precedence."""

    @classmethod
    def of(cls, scaffold: Scaffold, http: aiohttp.ClientSession, executor: Executor, command_timeout: float) -> "MiniScaffold":
        return cls(scaffold, templates(scaffold), http, executor, command_timeout, library().environment(scaffold.protocol))

    async def __call__(self, task: Task, sandbox: Sandbox, session: Session) -> ScaffoldEnd:
        def agent(bridge: Bridge) -> dict[str, Any]:
            model = GatewayModel(self.http, session, bridge, self.scaffold.protocol, self.words)
            environment = SandboxEnvironment(
                sandbox,
                bridge,
                workdir=task.workdir,
                env={**self.env, **task.env},
                timeout=self.command_timeout,
                submit_command=self.scaffold.submit_command,
            )
            settings = {"system_template": self.words.system, "instance_template": self.words.instance, "step_limit": 0, "cost_limit": 0}
            end: dict[str, Any] = library().agent(model, environment, **settings).run(task.statement)
            return end

        try:
            end = await in_thread(self.executor, agent)
        except GatewayRefused as error:
            return ScaffoldEnd(LIMIT_REACHED if error.status == 409 else "GatewayRefused", str(error))
        return ScaffoldEnd(end["exit_status"], end["submission"])
