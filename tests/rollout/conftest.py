"""Small repairs, and two scripted policies behind a real OpenAI-compatible server: the ground that the rollout tests stand on.

Both policies are functions of the messages alone, so a rollout that is run again goes the same way.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dagger_operator.api import DAggerRun, load
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import Stage
from dagger_operator.tasks.task import ScriptGrading, Task

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
SHORT = {
    "systemTemplate": "Repair the folder. One command in a mswea_bash_command block.",
    "instanceTemplate": "{{ task }}",
    "observationTemplate": "exit {{ output.returncode }}\n{{ output.output }}",
    "formatErrorTemplate": "{{ error }}",
}


def repair(number: int) -> Task:
    """A file holds the wrong word; the check that it holds the right one is hidden."""
    return Task(
        id=f"repair-{number}",
        statement=f"value.txt must say 'right {number}'.",
        files={"value.txt": f"wrong {number}\n"},
        grading=ScriptGrading(files={"check.sh": f'grep -qx "right {number}" value.txt\n'}, command="sh check.sh"),
    )


def say(command: str) -> str:
    return f"THOUGHT: next.\n\n```mswea_bash_command\n{command}\n```"


def teacher(messages: list[dict[str, Any]]) -> str:
    """Right at every state: looks, mends, submits."""
    last = str(messages[-1]["content"])
    if messages[-1]["role"] == "user" and len(messages) > 2:
        if "wrong" in last:
            return say("sed -i s/wrong/right/ value.txt && cat value.txt")
        if "right" in last and "must say" not in last:
            return say(SUBMIT)
    return say("cat value.txt")


def student(messages: list[dict[str, Any]]) -> str:
    """Often right, by a hash of the state; else it looks elsewhere, submits too early, or forgets the block."""
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()
    if digest[0] < 140:
        return teacher(messages)
    return (say("ls"), say("echo hm"), say("false"), "I do not know.", say(SUBMIT))[digest[1] % 5]


@dataclass
class Policies:
    """The server. `fault` may answer a request in a policy's place: model and messages in, a response or None out."""

    url: str = ""
    fault: Callable[[str, list[dict[str, Any]]], web.Response | None] = lambda model, messages: None
    requests: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = field(default_factory=list)
    tool_calls: bool = False
    serves: str | None = None
    """What its policy agent says that it serves; None while it starts."""

    async def policy(self, http: web.Request) -> web.Response:
        return web.json_response({"version": self.serves, "state": "Serving" if self.serves else "Starting"})

    async def chat(self, http: web.Request) -> web.Response:
        body = await http.json()
        model, messages = body["model"], body["messages"]
        self.requests.append((model, messages, body))
        if (answer := self.fault(model, messages)) is not None:
            return answer
        content = (teacher if model == "teacher" else student)(messages)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.tool_calls and "```" in content:
            command = content.split("\n")[-2]
            call = {"name": "bash", "arguments": json.dumps({"command": command})}
            message |= {"content": "next", "tool_calls": [{"id": f"call{len(messages)}", "type": "function", "function": call}]}
        usage = {"prompt_tokens": len(json.dumps(messages)) // 4, "completion_tokens": len(content.split())}
        reason = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        return web.json_response({"id": "x", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage})


@pytest.fixture
def policies_host() -> str:
    """Where they listen."""
    return "127.0.0.1"


@pytest.fixture
async def policies(policies_host: str) -> AsyncIterator[Policies]:
    server = Policies()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/policy", server.policy)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, policies_host, 0).start()
    server.url = f"http://{policies_host}:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


@dataclass(frozen=True)
class Ground:
    """A folder with tasks in it, and stages on a store beside them."""

    root: Path
    policies: Policies

    def run(self, *, train: int = 6, held_out: int = 4, **spec: Any) -> DAggerRun:
        """A run on `train` and `held_out` repairs; `spec` replaces top-level fields."""
        for name, numbers in (("train", range(train)), ("heldout", range(1000, 1000 + held_out))):
            (self.root / f"{name}.jsonl").write_text("".join(repair(number).model_dump_json() + "\n" for number in numbers))
        default = {
            "rounds": 2,
            "mixing": {"beta": {"type": "Constant", "value": 0.4}},
            "student": {"model": "student", "endpoint": {"url": self.policies.url}},
            "teacher": {"model": "teacher", "endpoint": {"url": self.policies.url}},
            "tasks": {
                "source": {"type": "JSONL", "uri": str(self.root / "train.jsonl")},
                "perRound": train,
                "heldOut": {"source": {"type": "JSONL", "uri": str(self.root / "heldout.jsonl")}},
            },
            "scaffold": {**SHORT, "maxTurns": 12},
            "sandbox": {"commandTimeoutSeconds": 20, "limits": {"processes": 64}},
            "rollouts": {"concurrency": 4, "leaseSeconds": 4, "infrastructureRetries": 1},
            "labels": {"attempts": 1},
            "training": {"mode": "Disabled"},
            "storage": {"url": f"file://{self.root}/store"},
        }
        return load({"metadata": {"name": "test"}, "spec": {**default, **spec}})

    def environ(self, run: DAggerRun, *, round_number: int = 1, index: int = 0, kind: str = "rollout") -> dict[str, str]:
        """What a runtime hands a stage."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "DAGGER_RUN": json.dumps(run.wire()),
            "DAGGER_ROUND": str(round_number),
            "JOB_COMPLETION_INDEX": str(index),
            "DAGGER_WORKER": f"{kind}-{index:04d}",
            "DAGGER_POLICY": run.spec.student.endpoint.version("student") if run.spec.student.endpoint else "r000-000000000000",
            "DAGGER_STUDENT_URL": self.policies.url,
            "DAGGER_TEACHER_URL": self.policies.url,
            "DAGGER_SCRATCH": str(self.root / f"scratch-{index}"),
            "DAGGER_TERMINATION_LOG": str(self.root / f"termination-{index}"),
            "OMP_NUM_THREADS": "1",
        }

    def stage(self, run: DAggerRun, **where: Any) -> Stage:
        return Stage.from_environment(self.environ(run, **where))

    def store(self, run: DAggerRun) -> Store:
        return Store.open(run.spec.storage)


@pytest.fixture
def ground(policies: Policies) -> Iterator[Ground]:
    # Not pytest's own folder: a sandbox's user has to be able to walk into it.
    with tempfile.TemporaryDirectory(prefix="dagger-rollout-") as folder:
        yield Ground(Path(folder), policies)
