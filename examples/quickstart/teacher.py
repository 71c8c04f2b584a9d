"""A scripted teacher behind a real OpenAI-compatible endpoint.

    python examples/quickstart/teacher.py --port 8971

It is stateless: each answer follows from the request's messages alone, so it can label any state that any student has
reached. It knows what the four helpers compute, and replays the conversation to determine what it still knows: a test
result is valid until something changes, a line that grep showed until its file changes, and after a command of unknown
effect it restores the files first.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from aiohttp import web

from tasks import CONSTANTS, FUNCTIONS, HELPERS, MODULES, ORIGINALS, TEST

RESTORE = f"rm -rf * && cp {ORIGINALS}/* ."
SUBMIT = "submit"

_EDIT = re.compile(r"sed -i '\d+s/\w+/\w+/' (\w+\.py)")
_SEARCH = re.compile(r'grep -n "(?:def (?=\w+")|(?=\w+ =))(\w+)(?: =)?" \*\.py')
_SIMPLE = re.compile(r"[^;|&<>()$`\n]+")
"""A single command: nothing that redirects, chains or substitutes."""
_READERS = ("grep ", "cat ", "ls", "head ", "tail ")
_NOT_RUN = re.compile(r"bash: (?:-c: )?line 1: .*(?:unexpected EOF|syntax error)|sed: -e expression", re.DOTALL)
"""Messages of bash and sed when they could not even parse a command."""
_LINE = re.compile(r"^(\w+\.py):(\d+):(.*)$", re.MULTILINE)
_FAIL = re.compile(r"FAIL (\w+)(?:\((\d+), (\d+)\))? got (\d+) want (\d+)")


@dataclass(frozen=True)
class Line:
    """A line that defines a name."""

    file: str
    number: int
    text: str


@dataclass(frozen=True)
class Knowledge:
    """What a conversation implies about the files as they are now."""

    understood: bool = True
    """Whether every change since the last restore was a plain edit of a module."""
    verdict: str | None = None
    """Output of the test, if nothing changed since."""
    lines: Mapping[str, Line | None] = field(default_factory=dict)
    """What grep showed, by name; None if it found nothing."""

    def after(self, command: str, output: str) -> "Knowledge":
        """Return what is known after a command has printed its output."""
        if command == TEST:
            return replace(self, verdict=output)
        if command == RESTORE:
            return Knowledge(understood=not output.startswith(("cp: ", "rm: ")))
        if search := _SEARCH.fullmatch(command):
            found = {_name(text): Line(file, int(number), text) for file, number, text in _LINE.findall(output)}
            return replace(self, lines={**self.lines, search[1]: found.get(search[1])})
        if edit := _EDIT.fullmatch(command):
            return self if output.startswith("sed: ") else self._edited(edit[1])
        return self if _changes_nothing(command, output) else replace(self, understood=False)

    def _edited(self, file: str) -> "Knowledge":
        lines = {name: line for name, line in self.lines.items() if line and line.file != file}
        return Knowledge(self.understood and file.removesuffix(".py") in MODULES, None, lines)


def _changes_nothing(command: str, output: str) -> bool:
    if "\n" not in command and _NOT_RUN.match(output):
        return True
    return bool(_SIMPLE.fullmatch(command)) and (command.startswith(_READERS) or output.endswith("command not found"))


def act(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the right next command at this state."""
    known = Knowledge()
    for command, output in _turns(messages):
        known = known.after(command, output)
    if not known.understood:
        return RESTORE
    if known.verdict is None:
        return TEST
    if known.verdict.startswith("PASS "):
        return SUBMIT
    return _repair(known.verdict, known.lines)


def _repair(verdict: str, lines: Mapping[str, Line | None]) -> str:
    failure = _FAIL.fullmatch(verdict)
    if failure is None:
        return RESTORE  # it does not even run
    name, a, b, got, want = failure.groups()
    if name not in lines:
        return f'grep -n "def {name}" *.py' if a else f'grep -n "{name} =" *.py'
    line = lines[name]
    if line is None:
        return RESTORE  # the name that the test uses is defined nowhere
    wrong, right = _call(int(a), int(b), int(got), int(want)) if a else (got, want)
    expected = f"def {name}(a, b): return {wrong}(a, b)" if a else f"{name} = {wrong}"
    # A line that does not explain the failure, or a failure that no helper would fix: something else was changed.
    return f"sed -i '{line.number}s/{wrong}/{right}/' {line.file}" if line.text == expected and wrong != right else RESTORE


def _call(a: int, b: int, got: int, want: int) -> tuple[str, str]:
    """Return the helper that a line calls and the right one; twice the same if they do not explain the failure."""
    by_result = {function(a, b): helper for helper, (_, function) in HELPERS.items()}
    wrong = by_result.get(got, "")
    return wrong, by_result.get(want, wrong)


def _name(text: str) -> str:
    """Return the name that a line defines."""
    definition = re.match(r"(?:def )?(\w+)", text)
    return definition[1] if definition else ""


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return commands and what each printed. An answer without a command got an error message and changed nothing."""
    pairs = pairwise(messages)
    return [(_text(m), _text(n)) for m, n in pairs if m["role"] == "assistant" and n["role"] == "user"]


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return (content if isinstance(content, str) else "".join(part.get("text", "") for part in content)).strip()


def act_as_student(messages: Sequence[Mapping[str, Any]]) -> str:
    """Act as a student for tests: mostly right, otherwise wrong in typical ways; always the same at the same state."""
    state = json.dumps([(m["role"], _text(m)) for m in messages]).encode()
    rng = random.Random(hashlib.sha256(state).digest())
    return act(messages) if rng.random() < 0.6 else mistake(rng, messages)


def mistake(rng: random.Random, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a command that a half-trained student might plausibly give."""
    module, name, constant = rng.choice(MODULES), rng.choice(FUNCTIONS), rng.choice(CONSTANTS)
    helper, other = rng.sample(list(HELPERS), 2)
    past = [command for command, _ in _turns(messages)] or [TEST]
    right = act(messages)
    edit = _EDIT.fullmatch(right)
    guesses = [
        f'grep -n "def {name}" *.py',
        f'grep -n "{constant} =" *.py',
        f"sed -i '{rng.randint(1, 6)}s/{helper}/{other}/' {module}.py",
        f"sed -i '{rng.randint(1, 6)}s/def/{helper}/' {module}.py",
        f"sed -i '2s/mod/{helper}/ {module}.py",
        f"sed -i '{rng.randint(1, 9)}d' *.py",
        f"{module} {name} 5",
        f"echo {name} > {module}.py",
        "cat *.py",
        "rm *.py",
        RESTORE,
        SUBMIT,
        TEST,
        rng.choice(past),
        right.replace(" ", "", 1),
        right[: rng.randint(1, len(right))],
    ]
    if edit:  # the most likely mistake: the right place, the wrong guess
        guesses += [right.replace(right.split("/")[2], helper)] * len(guesses)
    return rng.choice(guesses)


POLICIES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {"teacher": act, "scripted-student": act_as_student}
"""Model name -> policy."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    policy = POLICIES.get(body.get("model", ""))
    if policy is None:
        return _error(404, f"no model {body.get('model')!r} here; known: {', '.join(POLICIES)}")
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        return _error(400, "messages must be a list of objects with a role")
    content = policy(messages)
    common = {"id": "chatcmpl-" + hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16], "created": 0, "model": body["model"]}
    usage = _usage(messages, content)
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", "logprobs": None}
        return web.json_response(common | {"object": "chat.completion", "choices": [choice], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    async for chunk in _chunks(content):
        await _send(response, common | {"object": "chat.completion.chunk", "choices": [chunk]})
    if (body.get("stream_options") or {}).get("include_usage"):
        await _send(response, common | {"object": "chat.completion.chunk", "choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _chunks(content: str) -> AsyncIterator[dict[str, Any]]:
    yield {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    for part in re.findall(r"\s*\S+", content):
        yield {"index": 0, "delta": {"content": part}, "finish_reason": None}
    yield {"index": 0, "delta": {}, "finish_reason": "stop"}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _usage(messages: Sequence[Mapping[str, Any]], content: str) -> dict[str, int]:
    """Count words and punctuation as tokens: a scripted policy has no tokenizer."""
    prompt = sum(len(re.findall(r"\w+|[^\w\s]", _text(m))) for m in messages)
    completion = len(re.findall(r"\w+|[^\w\s]", content))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(status: int, message: str) -> web.Response:
    kind = "model_not_found" if status == 404 else "invalid_request_error"
    return web.json_response({"error": {"message": message, "type": "invalid_request_error", "code": kind}}, status=status)


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "quickstart"} for name in POLICIES]})


def make_app() -> web.Application:
    app = web.Application(client_max_size=8 << 20)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8971)
    options = parser.parse_args()
    web.run_app(make_app(), host=options.host, port=options.port, print=None, access_log=None)


if __name__ == "__main__":
    main()
