"""The teacher is right at every state that a student can reach: shown by students that do all they can to get lost."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp.test_utils import TestServer
from jinja2 import Template

import teacher
from dagger_operator.sandbox.interface import Sandbox, SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.tasks.task import ScriptGrading, Task
from tasks import TEST, generate

PIECES = [
    *("sed -i '", "s/", "/' ", "grep -n ", '"', " *.py", "python3 ", "test.py", ".py", "cat ", "echo ", " > ", " && ", "; ", "mv ", "rm "),
    *(
        "tax",
        "geo",
        "lib",
        "mul",
        "dot",
        "mix",
        "def ",
        "(a, b)",
        ": return ",
        "1",
        "2",
        "7",
        "d",
        " ",
        "\n",
        "RATE",
        " = ",
        "rm -rf *",
    ),
]


class Episode:
    """A task in a real sandbox, and the conversation so far."""

    def __init__(self, task: Task, sandbox: Sandbox, observation: Template) -> None:
        self.task, self.sandbox, self.observation = task, sandbox, observation
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": "-"}, {"role": "user", "content": task.statement}]
        self.submitted = False

    async def turn(self, command: str) -> None:
        if command == teacher.SUBMIT:
            self.submitted = True
        elif not command.strip():
            self.messages.append({"role": "user", "content": "no command"})  # a format error: the answer is not kept
        else:
            result = await self.sandbox.execute(command, timeout=20)
            seen = self.observation.render(output={"output": result.output, "returncode": result.returncode})
            self.messages += [{"role": "assistant", "content": command}, {"role": "user", "content": seen}]

    async def resolved(self) -> bool:
        grading = self.task.grading
        assert isinstance(grading, ScriptGrading)
        await self.sandbox.write(grading.files)
        return (await self.sandbox.execute(grading.command, timeout=20)).returncode == 0


class Opened:
    """Async context: a sandbox with the task's files."""

    def __init__(self, sandboxes: ProcessSandboxes, task: Task, quickstart: Path) -> None:
        self.sandboxes, self.task = sandboxes, task
        run = yaml.safe_load((quickstart / "dagger-run.yaml").read_text())
        self.observation = Template(run["spec"]["scaffold"]["observationTemplate"])

    async def __aenter__(self) -> Episode:
        request = SandboxRequest(name=self.task.id, workdir=self.task.workdir, files=self.task.files)
        self.sandbox = await self.sandboxes.create(request, timeout=60)
        return Episode(self.task, self.sandbox, self.observation)

    async def __aexit__(self, *_: object) -> None:
        await self.sandbox.close()


async def get_lost_and_recover(sandboxes: ProcessSandboxes, quickstart: Path, seed: int) -> None:
    rng = random.Random(seed)
    task = next(generate(seed, 1, held_out=bool(seed % 2)))

    def soup(_: Sequence[Mapping[str, Any]]) -> str:
        return "".join(rng.choices(PIECES, k=rng.randint(1, 9)))

    def mistake(messages: Sequence[Mapping[str, Any]]) -> str:
        return teacher.mistake(rng, messages)

    async with Opened(sandboxes, task, quickstart) as episode:
        for _ in range(rng.randint(1, 12)):
            command = rng.choices([mistake, soup, teacher.act], weights=[4, 1, 4])[0](episode.messages)
            if command != teacher.SUBMIT:  # which would end it
                await episode.turn(command)
        lost_at = len(episode.messages)
        # Restore, test, search, edit, test, submit; and three turns for each plain edit that made another check fail.
        for _ in range(24):
            if episode.submitted:
                break
            await episode.turn(teacher.act(episode.messages))
        story = [message["content"] for message in episode.messages]
        assert episode.submitted, f"seed {seed}: the teacher did not finish after {story[:lost_at]}: {story[lost_at:]}"
        assert await episode.resolved(), f"seed {seed}: the teacher submitted wrong work: {story}"


async def test_from_any_state_that_a_student_reaches_the_teacher_resolves_the_task(sandboxes: ProcessSandboxes, quickstart: Path) -> None:
    await asyncio.gather(*(get_lost_and_recover(sandboxes, quickstart, seed) for seed in range(16)))


@pytest.mark.heavy
@pytest.mark.parametrize("block", range(4))
async def test_from_many_more_states_too(sandboxes: ProcessSandboxes, quickstart: Path, block: int) -> None:
    await asyncio.gather(*(get_lost_and_recover(sandboxes, quickstart, seed) for seed in range(100 + 20 * block, 120 + 20 * block)))


async def test_alone_the_teacher_needs_five_turns(sandboxes: ProcessSandboxes, quickstart: Path) -> None:
    for task in [*generate(1, 8, held_out=False), *generate(1, 4, held_out=True)]:
        async with Opened(sandboxes, task, quickstart) as episode:
            before = await episode.sandbox.execute(TEST, timeout=20)
            assert before.returncode == 1 and before.output.startswith("FAIL ")
            for _ in range(5):
                await episode.turn(teacher.act(episode.messages))
            assert episode.submitted and await episode.resolved()


@pytest.fixture
async def endpoint() -> Any:
    server = TestServer(teacher.make_app())
    await server.start_server()
    async with aiohttp.ClientSession(str(server.make_url("/"))) as client:
        yield client
    await server.close()


QUESTION = {"model": "teacher", "messages": [{"role": "user", "content": "python3 test.py fails."}]}


async def test_the_endpoint_answers_as_openai_does_whole_and_streamed(endpoint: aiohttp.ClientSession) -> None:
    whole = await (await endpoint.post("/v1/chat/completions", json=QUESTION)).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": TEST} and whole["choices"][0]["finish_reason"] == "stop"
    stream = QUESTION | {"stream": True, "stream_options": {"include_usage": True}}
    lines = (await (await endpoint.post("/v1/chat/completions", json=stream)).text()).split("\n\n")
    events = [yaml.safe_load(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == TEST
    assert events[-1]["usage"] == whole["usage"] and lines[-2] == "data: [DONE]"


async def test_the_endpoint_refuses_what_it_cannot_do(endpoint: aiohttp.ClientSession) -> None:
    unknown = await endpoint.post("/v1/chat/completions", json=QUESTION | {"model": "gpt"})
    assert unknown.status == 404 and "scripted-student" in (await unknown.json())["error"]["message"]
    assert (await endpoint.post("/v1/chat/completions", json={"model": "teacher", "messages": "hello"})).status == 400
    assert {m["id"] for m in (await (await endpoint.get("/v1/models")).json())["data"]} == set(teacher.POLICIES)


def test_the_scripted_student_does_the_same_at_the_same_state_and_is_no_teacher() -> None:
    states = [[{"role": "user", "content": f"state {n}"}] for n in range(200)]
    assert [teacher.act_as_student(state) for state in states] == [teacher.act_as_student(state) for state in states]
    right = sum(teacher.act_as_student(state) == teacher.act(state) for state in states) / len(states)
    assert 0.5 < right < 0.9
