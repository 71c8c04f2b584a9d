"""Scaffolds between a real gateway and a real sandbox."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from yarl import URL

from dagger_operator.api import Mixing, Protocol, Role, Scaffold, Schedule, ScheduleType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.rollout_session import RolloutSession
from dagger_operator.policy.session import SessionRequest
from dagger_operator.policy.upstream import upstreams
from dagger_operator.rollout.actions import action_reader
from dagger_operator.rollout.command_scaffold import CommandScaffold
from dagger_operator.rollout.mini_scaffold import MiniScaffold
from dagger_operator.rollout.scaffold import ScaffoldEnd
from dagger_operator.sandbox.interface import Sandbox, SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.tasks.task import Task

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
TASK = Task.model_validate(
    {"id": "t", "statement": "value.txt must say 'right 1'.", "files": {"value.txt": "wrong 1\n"}, "grading": {"command": "true"}}
)


@asynccontextmanager
async def opened(
    ground: Any, scaffold: Scaffold, *, beta: float = 1.0, max_turns: int = 8, network: bool = False
) -> AsyncIterator[tuple[RolloutSession, Sandbox]]:
    run = ground.run()
    stage = ground.stage(run)
    student, teacher = await upstreams(stage, greedy=False)
    request = SessionRequest(
        seed=0,
        round=1,
        rollout_id="t",
        task_id="t",
        student=student.version,
        max_turns=max_turns,
        label_check=action_reader(scaffold).flaw,
        mixing=Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=beta)),
    )
    async with (
        Gateway(student, teacher, run.spec.labels) as gateway,
        ProcessSandboxes(run.spec.sandbox.limits, ground.root / "s") as provider,
    ):
        session = gateway.open(request)
        reach = URL(session.base_url).authority if network else None
        sandbox = await provider.create(SandboxRequest(name="t", files=TASK.files, network_to=reach), timeout=30)
        try:
            yield session, sandbox
        finally:
            await sandbox.close()


async def mini(scaffold: Scaffold, session: RolloutSession, sandbox: Sandbox, timeout: float = 20, task: Task = TASK) -> ScaffoldEnd:
    with ThreadPoolExecutor(1) as executor:
        async with aiohttp.ClientSession() as http:
            return await MiniScaffold.of(scaffold, http, executor, timeout)(task, sandbox, session)


async def test_the_librarys_own_prompts_lead_to_a_mended_file(ground: Any) -> None:
    scaffold = Scaffold()
    async with opened(ground, scaffold) as (session, sandbox):
        end = await mini(scaffold, session, sandbox)
        assert end == ScaffoldEnd("Submitted", "")
        assert await sandbox.read("value.txt") == b"right 1\n"
        recording = await session.finish()
    assert [turn.actor for turn in recording.turns] == [Role.TEACHER] * 3
    system, first = recording.turns[0].messages
    assert "exactly ONE bash code block" in system["content"]
    assert TASK.statement in first["content"]
    # What follows a turn: the action that was taken, and what the sandbox said.
    assert recording.turns[1].messages[0] == recording.turns[0].action.message
    assert recording.turns[1].messages[1]["content"] == "<returncode>0</returncode>\n<output>\nwrong 1\n</output>"
    assert all(turn.label == turn.action for turn in recording.turns)


async def test_tool_calls_go_out_and_their_results_come_back(ground: Any) -> None:
    ground.policies.tool_calls = True
    scaffold = Scaffold.model_validate(
        {"protocol": "ToolCall", "observationTemplate": "{{ output.output }}", "instanceTemplate": "{{ task }}"}
    )

    def teach(model: str, messages: list[dict[str, Any]]) -> None:
        # The scripted teacher reads users; a tool's result reaches it as one.
        for message in messages:
            message["role"] = "user" if message["role"] == "tool" else message["role"]

    ground.policies.fault = teach
    async with opened(ground, scaffold) as (session, sandbox):
        assert (await mini(scaffold, session, sandbox)).submitted
        recording = await session.finish()
    assert [tool["function"]["name"] for tool in recording.turns[0].tools or ()] == ["bash"]
    reply = recording.turns[1].messages[1]
    assert (reply["role"], reply["tool_call_id"], reply["content"]) == ("tool", "call2", "wrong 1\n")
    assert all(turn.label_flaw is None for turn in recording.turns)


async def test_a_turn_without_a_command_is_told_so_and_three_in_a_row_end_it(ground: Any) -> None:
    ground.policies.fault = _says("no command here")
    scaffold = Scaffold(format_error_template="found {{ actions | length }} ({{ error }})")
    async with opened(ground, scaffold) as (session, sandbox):
        end = await mini(scaffold, session, sandbox)
        recording = await session.finish()
    assert end.status == "RepeatedFormatError"
    assert recording.turns[1].messages[-1]["content"] == "found 0 (Expected exactly 1 action, found 0.)"
    assert {turn.label_flaw.value for turn in recording.turns if turn.label_flaw} == {"Unparsable"}


async def test_the_gateways_limit_ends_the_rollout(ground: Any) -> None:
    ground.policies.fault = _says("```mswea_bash_command\necho hm\n```")
    async with opened(ground, Scaffold(), max_turns=2) as (session, sandbox):
        end = await mini(Scaffold(), session, sandbox)
        recording = await session.finish()
    assert (end.status, recording.limit_reached, len(recording.turns)) == ("LimitReached", True, 2)


async def test_a_command_that_hangs_is_an_observation(ground: Any) -> None:
    def hang_once(model: str, messages: list[dict[str, Any]]) -> Any:
        return _says("```mswea_bash_command\nsleep 60\n```")(model, messages) if len(messages) == 2 else None

    ground.policies.fault = hang_once
    async with opened(ground, Scaffold()) as (session, sandbox):
        assert (await mini(Scaffold(), session, sandbox, timeout=1)).submitted
        recording = await session.finish()
    told = recording.turns[1].messages[-1]["content"]
    assert told.startswith(
        "<exception>The command was still running after 1 seconds and was killed.</exception>\n<returncode>124</returncode>"
    )


@pytest.mark.parametrize(
    ("submit_command", "said", "submission"),
    [
        ("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat value.txt", "wrong 1\n"),
        ("submit", "submit", ""),
        ("echo DONE", "echo; echo DONE", ""),
    ],
)
async def test_an_agent_submits_in_the_runs_own_words(ground: Any, submit_command: str, said: str, submission: str) -> None:
    ground.policies.fault = _says(f"```mswea_bash_command\n{said}\n```")
    scaffold = Scaffold(submit_command=submit_command)
    async with opened(ground, scaffold) as (session, sandbox):
        assert await mini(scaffold, session, sandbox) == ScaffoldEnd("Submitted", submission)


async def test_a_submission_that_fails_is_none(ground: Any) -> None:
    ground.policies.fault = _says("```mswea_bash_command\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat missing\n```")
    async with opened(ground, Scaffold(), max_turns=2) as (session, sandbox):
        assert (await mini(Scaffold(), session, sandbox)).status == "LimitReached"


async def test_no_variable_of_the_worker_reaches_a_template(ground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGGER_TEACHER_TOKEN", "secret")
    scaffold = Scaffold(observation_template="{{ output.output }}{% if DAGGER_TEACHER_TOKEN is defined %}leak{% endif %}")
    async with opened(ground, scaffold) as (session, sandbox):
        await mini(scaffold, session, sandbox)
        recording = await session.finish()
    assert all("leak" not in str(turn.messages) for turn in recording.turns)


IN_CONDA = TASK.model_copy(update={"env": {"BASH_ENV": "/home/agent/.bashrc", "PAGER": "the task's"}})


async def test_an_agents_commands_run_in_the_environment_that_its_image_activates(ground: Any) -> None:
    ground.policies.fault = _says(f"```mswea_bash_command\n{SUBMIT} && python && echo $PAGER $TQDM_DISABLE\n```")
    async with opened(ground, Scaffold()) as (session, sandbox):
        await _activating(sandbox)
        assert await mini(Scaffold(), session, sandbox, task=IN_CONDA) == ScaffoldEnd("Submitted", "testbed's\nthe task's 1\n")
        # Nobody else's do: what we run there does not depend on it.
        assert (await sandbox.execute("python", timeout=20)).output != "testbed's\n"


async def test_a_program_in_the_sandbox_runs_in_the_environment_that_its_image_activates(ground: Any) -> None:
    command = ("sh", "-c", 'python > seen; echo "$DAGGER_TASK_STATEMENT" >> seen')
    async with opened(ground, Scaffold.model_validate({"type": "Command", "command": list(command)}), network=True) as (session, sandbox):
        await _activating(sandbox)
        assert (await CommandScaffold(command, timeout=60)(IN_CONDA, sandbox, session)).submitted
        assert await sandbox.read("seen") == f"testbed's\n{TASK.statement}\n".encode()


@pytest.mark.parametrize("protocol", Protocol)
async def test_an_image_that_activates_nothing_is_as_it_was(ground: Any, protocol: Protocol) -> None:
    task = TASK.model_copy(update={"env": {"BASH_ENV": "/nowhere/.bashrc"}})
    ground.policies.tool_calls = protocol is Protocol.TOOL_CALL
    ground.policies.fault = lambda model, messages: None if len(messages) == 2 else _says("I do not know.")(model, messages)
    scaffold = Scaffold(protocol=protocol, observation_template="exit {{ output.returncode }}\n{{ output.output }}")
    async with opened(ground, scaffold, max_turns=2) as (session, sandbox):
        await mini(scaffold, session, sandbox, task=task)
        recording = await session.finish()
    assert recording.turns[1].messages[1]["content"] == "exit 0\nwrong 1\n"


async def _activating(sandbox: Sandbox) -> None:
    """Gives a sandbox what conda's images have: an environment with its own `python`, which one file activates."""
    await sandbox.write(
        {"/home/agent/.bashrc": "export PATH=~/testbed:$PATH\n", "/home/agent/testbed/python": '#!/bin/sh\necho "testbed\'s"\n'}
    )
    assert (await sandbox.execute("chmod +x ~/testbed/python", timeout=20)).returncode == 0


async def test_a_cancelled_rollout_leaves_no_agent_behind(ground: Any) -> None:
    ground.policies.fault = _says("```mswea_bash_command\nsleep 300\n```")
    async with opened(ground, Scaffold()) as (session, sandbox):
        running = asyncio.create_task(mini(Scaffold(), session, sandbox, timeout=300))
        while not ground.policies.requests:
            await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):  # and the executor's shutdown, which waits for the thread, came to an end
            await asyncio.wait_for(running, 60)


AGENT = r"""
import json, os, urllib.request
messages = [{"role": "system", "content": "s"}, {"role": "user", "content": os.environ["DAGGER_TASK_STATEMENT"]}]
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
body = json.dumps({"model": "policy", "messages": messages}).encode()
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"], file=open("answer.txt", "w"))
"""


async def test_any_program_in_the_sandbox_reaches_the_policies_through_the_gateway(ground: Any) -> None:
    scaffold = Scaffold.model_validate({"type": "Command", "command": ["python3", "agent.py"]})
    async with opened(ground, scaffold, network=True) as (session, sandbox):
        await sandbox.write({"agent.py": AGENT})
        end = await CommandScaffold(("python3", "agent.py"), timeout=60)(TASK, sandbox, session)
        recording = await session.finish()
        assert end == ScaffoldEnd("Submitted"), end
        assert b"cat value.txt" in (await sandbox.read("answer.txt") or b"")
    assert recording.turns[0].messages[1]["content"] == TASK.statement


@pytest.mark.parametrize(
    ("command", "timeout", "status"),
    [(("sh", "-c", "exit 3"), 60, "ExitCode3"), (("sleep", "60"), 1, "Deadline"), (("true",), 60, "Submitted")],
)
async def test_a_programs_exit_code_says_how_it_ended(ground: Any, command: tuple[str, ...], timeout: float, status: str) -> None:
    scaffold = Scaffold.model_validate({"type": "Command", "command": list(command)})
    async with opened(ground, scaffold, network=True) as (session, sandbox):
        assert (await CommandScaffold(command, timeout)(TASK, sandbox, session)).status == status


def _says(content: str) -> Callable[[str, list[dict[str, Any]]], Any]:
    from aiohttp import web

    def answer(model: str, messages: list[dict[str, Any]]) -> web.Response:
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return web.json_response({"id": "x", "object": "chat.completion", "model": model, "choices": [choice]})

    return answer
