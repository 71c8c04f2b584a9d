"""Preflight tells each way in which a policy can be unfit, with its own reason and what to change."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from tokenizers import Tokenizer, models

from dagger_operator.api import Role
from dagger_operator.serving import examination
from dagger_operator.serving.preflight import preflight
from dagger_operator.store import layout
from dagger_operator.store.policies import point_to
from dagger_operator.store.progress import read_progress
from dagger_operator.store.results import PreflightResult, PrepareResult, read_result, save_result
from dagger_operator.store.stage import Stage, StageFailure

STUDENT = "r000-aaaaaaaaaaaa"
TOKEN = "sk-very-secret-token"
TOKENIZER = Tokenizer(models.WordLevel({"cat": 0, "ls": 1}, unk_token="cat")).to_str().encode()


class Endpoint:
    """An OpenAI-compatible endpoint that is as it should be, unless told otherwise."""

    def __init__(self, model: str, **habits: Any) -> None:
        self.model, self.habits = model, {"finish": "stop", "stream": True, "tools": True, "weights": "w", "length": 4096, **habits}
        self.refusals = self.habits.get("refusals", 0)
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/policy", self._policy)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _policy(self, _: web.Request) -> web.Response:
        said = {"version": self.model, "digest": "d", "state": "Serving", "max_model_len": self.habits["length"], "reason": ""}
        return web.json_response(said | {"weights": self.habits["weights"]})

    async def _models(self, _: web.Request) -> web.Response:
        if "models" in self.habits:
            return web.Response(status=self.habits["models"])
        return web.json_response({"object": "list", "data": [{"id": self.model, "max_model_len": self.habits["length"]}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if "sleep" in self.habits:
            await asyncio.sleep(self.habits["sleep"])
        if "status" in self.habits and self.refusals >= 0:
            self.refusals -= 1
            text = self.habits.get("says", f"told {request.headers.get('Authorization')}")
            return web.json_response({"error": {"message": text}}, status=self.habits["status"], headers=self.habits.get("headers"))
        if self.habits.get("reasons"):
            wrong = next((name for name in ("max_tokens", "temperature", "top_p") if name in body), None)
            if wrong:
                more = " Use 'max_completion_tokens' instead." if wrong == "max_tokens" else ""
                message = f"Unsupported parameter: '{wrong}' is not supported with this model.{more}"
                return web.json_response({"error": {"message": message, "code": "unsupported_parameter"}}, status=400)
        if "body" in self.habits:
            return web.Response(text=self.habits["body"], content_type="application/json")
        if body["model"] != self.model:
            return web.json_response({"error": {"message": "The model does not exist"}}, status=404)
        if body.get("stream") and self.habits["stream"]:
            event = json.dumps({"choices": [{"index": 0, "delta": {"content": "ls"}, "finish_reason": "stop"}]})
            return web.Response(text=f"data: {event}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.habits.get("content", "ls"),
            "reasoning": self.habits.get("reasoning"),
        }
        if body.get("tools") and self.habits["tools"] and body["messages"][-1]["role"] != "tool":
            arguments = self.habits.get("arguments", '{"command": "pwd"}')
            message["tool_calls"] = [{"id": "1", "type": "function", "function": {"name": "bash", "arguments": arguments}}]
        choice = {"index": 0, "message": message, "finish_reason": self.habits["finish"]}
        if body.get("logprobs") and (token := self.habits.get("token")):
            top = [{"token": token, "logprob": -0.5}] * body["top_logprobs"]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})


@contextlib.asynccontextmanager
async def listening(*endpoints: Endpoint) -> AsyncIterator[list[str]]:
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for endpoint in endpoints:
            runner = web.AppRunner(endpoint.application(), shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        yield urls


@pytest.fixture
def examine(stage: Callable[..., Stage], document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Preflight of these students and this teacher; its checks."""
    monkeypatch.setattr(examination, "ENDPOINT_PATIENCE_SECONDS", 1.5)

    async def go(teacher: Endpoint, *students: Endpoint, token: str = TOKEN, **spec: Any) -> dict[str, str]:
        students = students or (Endpoint(STUDENT),)
        document["spec"]["student"]["serving"]["replicas"] = len(students)
        document["spec"]["teacher"]["endpoint"] |= {"secretRef": {"name": "keys"}, **spec.pop("endpoint", {})}
        document["spec"] |= spec
        async with listening(teacher, *students) as urls:
            document["spec"]["teacher"]["endpoint"]["url"] = urls[0]
            made = stage(DAGGER_STUDENT_URL=",".join(urls[1:]), DAGGER_TEACHER_URL=urls[0], DAGGER_TEACHER_TOKEN=token)
            await save_result(made.store, 0, PrepareResult(policy=STUDENT, teacher="endpoint-1"))
            await point_to(made.store, STUDENT, 0)
            await made.store.put(layout.policy(STUDENT) + "tokenizer.json", TOKENIZER)
            await preflight(made)
            result = await read_result(made.store, 0, PreflightResult)
            assert result is not None and (result.student, result.teacher) == (STUDENT, "endpoint-1")
            progress = (await read_progress(made.store, 0, "preflight"))[0]
            assert (progress.done, progress.total, progress.unit) == (2, 2, "policies")
            return result.checks

    return go


async def test_policies_that_are_fit_pass_and_what_was_found_is_written_down(examine: Any) -> None:
    teacher = Endpoint("teach")
    checks = await examine(teacher, Endpoint(STUDENT), Endpoint(STUDENT), scaffold={"protocol": "ToolCall"})
    assert checks["student.replicas"] == f"2 serve {STUDENT} with weights w"
    assert checks["student.agreement"] == "same greedy answer"
    assert checks["teacher.context"] == "4096 tokens"
    for role in ("student", "teacher"):
        assert checks[f"{role}.streaming"] == "works"
        assert checks[f"{role}.tools"] == "calls a tool and takes its result"
        assert checks[f"{role}.stop"] == "ends by itself (stop)"
    assert {request["max_tokens"] for request in teacher.requests} == {64}  # asked with the run's own sampling
    assert not any("warning" in what for what in checks.values())


@pytest.mark.parametrize(
    ("habits", "reason", "permanent", "said"),
    [
        ({"status": 401}, "TeacherUnauthorized", True, "Secret that teacher.endpoint.secretRef names"),
        ({"status": 403}, "TeacherUnauthorized", True, "answers 403"),
        ({"status": 404}, "TeacherUnknown", True, "correct teacher.endpoint.model"),
        ({"status": 400}, "TeacherRefuses", True, "look at teacher.sampling"),
        ({"status": 302, "headers": {"Location": "http://127.0.0.1:9/"}}, "TeacherMoved", True, "a redirect"),
        ({"status": 429, "refusals": 99}, "TeacherOverloaded", False, "rate limit"),
        ({"status": 503, "refusals": 99}, "TeacherFailing", False, "look at the logs of that server"),
        ({"sleep": 5}, "TeacherSlow", False, "not answered within 1 s.*teacher.endpoint.timeoutSeconds"),
        ({"body": "<html>"}, "TeacherGarbled", True, "must speak the OpenAI API"),
        ({"body": '{"choices": []}'}, "TeacherGarbled", True, "is no chat completion"),
        ({"content": None}, "TeacherGarbled", True, "is no chat completion"),
        ({"finish": "content_filter"}, "TeacherGarbled", True, "content_filter"),
        ({"finish": "length"}, "TeacherTruncates", True, "raise teacher.sampling.maxTokens"),
        ({"length": 64}, "TeacherContextTooShort", True, "lower teacher.sampling.maxTokens"),
    ],
)
async def test_a_teacher_that_would_spoil_labels_stops_the_run(
    examine: Any, habits: dict[str, Any], reason: str, permanent: bool, said: str
) -> None:
    with pytest.raises(StageFailure, match=said) as failed:
        await examine(Endpoint("teach", **habits), endpoint={"timeoutSeconds": 1})
    assert (failed.value.reason, failed.value.permanent) == (reason, permanent)
    assert TOKEN not in str(failed.value)


@pytest.mark.parametrize("token", [TOKEN + "\n", f"\t {TOKEN}\r\n"])
async def test_white_space_around_a_key_is_no_part_of_it(examine: Any, token: str) -> None:
    teacher = Endpoint("teach")
    await examine(teacher, token=token)
    assert teacher.keys == {f"Bearer {TOKEN}"}


async def test_a_key_that_no_header_can_hold_is_told_as_the_secrets_fault(examine: Any) -> None:
    with pytest.raises(StageFailure, match=r"put the key alone into the Secret that teacher\.endpoint\.secretRef names") as failed:
        await examine(Endpoint("teach"), token=f"{TOKEN}\nanother line")
    assert (failed.value.reason, failed.value.permanent) == ("TeacherUnauthorized", True)
    assert TOKEN not in str(failed.value)


async def test_a_key_that_lies_where_an_endpoints_words_are_cut_is_not_told_in_part(examine: Any) -> None:
    with pytest.raises(StageFailure, match="x your key") as failed:
        await examine(Endpoint("teach", status=401, says="x" * 280 + f" your key {TOKEN} is wrong"))
    assert TOKEN[:5] not in str(failed.value)


async def test_what_passes_is_borne(examine: Any) -> None:
    teacher = Endpoint("teach", status=503, refusals=0, models=404)
    checks = await examine(teacher)
    assert checks["teacher.model"] == "no list of models is offered"
    assert checks["teacher.context"] == "not reported"


async def test_a_mistyped_model_is_told_the_closest_one(examine: Any) -> None:
    with pytest.raises(StageFailure, match="the closest that is: teach-30b") as failed:
        await examine(Endpoint("teach-30b"), endpoint={"model": "teach-30"})
    assert failed.value.reason == "TeacherUnknown"


async def test_a_teacher_that_is_not_there_is_named(examine: Any, document: dict[str, Any], stage: Callable[..., Stage]) -> None:
    made = stage(DAGGER_STUDENT_URL="http://127.0.0.1:9/v1", DAGGER_TEACHER_URL="http://127.0.0.1:9/v1")
    with pytest.raises(StageFailure, match=r"(?s)http://127.0.0.1:9/v1.*start it, or correct teacher.endpoint.url") as failed:
        await examination.Examination(made, Role.TEACHER, "endpoint-1", STUDENT).run()
    assert (failed.value.reason, failed.value.permanent) == ("TeacherUnreachable", False)


@pytest.mark.parametrize("habits", [{"tools": False}, {"arguments": "{"}, {"arguments": '{"cmd": "pwd"}'}])
async def test_a_teacher_that_calls_no_tools_stops_only_a_run_that_needs_them(examine: Any, habits: dict[str, Any]) -> None:
    with pytest.raises(StageFailure, match=r"use scaffold\.protocol Text") as failed:
        await examine(Endpoint("teach", **habits), scaffold={"protocol": "ToolCall"})
    assert failed.value.reason == "TeacherCallsNoTools"
    assert "teacher.tools" not in await examine(Endpoint("teach", **habits), scaffold={"protocol": "Text"})


async def test_an_untrained_student_passes_with_warnings(examine: Any) -> None:
    checks = await examine(Endpoint("teach"), Endpoint(STUDENT, finish="length", tools=False), scaffold={"protocol": "ToolCall"})
    assert checks["student.stop"].startswith("warning: does not end by itself")
    assert checks["student.tools"].startswith("warning: it answered without a tool call")


THOUGHTS = [
    {"content": "<think>\nHm.\n</think>\n\nls"},
    {"content": "<think>\nHm", "finish": "length"},
    {"content": "Hm.\n</think>\n\nls"},
    {"reasoning": "Hm.", "content": "ls"},
    {"reasoning": "Hm", "content": None, "finish": "length"},
]


@pytest.mark.parametrize("habits", THOUGHTS, ids=["in its text", "cut off", "opened by the prompt", "by a parser", "by a parser, cut off"])
async def test_a_student_that_thinks_passes_with_a_warning_that_says_what_to_write(examine: Any, habits: dict[str, Any]) -> None:
    checks = await examine(Endpoint("teach"), Endpoint(STUDENT, **habits), scaffold={"protocol": "Text"})
    assert checks["student.thinking"].startswith("warning: it thinks before it answers")
    assert checks["student.thinking"].endswith("""extraArgs ["--default-chat-template-kwargs", '{"enable_thinking": false}']""")


async def test_a_teacher_may_think(examine: Any) -> None:
    checks = await examine(Endpoint("teach", reasoning="Hm."))
    assert not any("warning" in what for what in checks.values())


async def test_a_teacher_that_is_cut_off_in_its_thoughts_needs_more_tokens(examine: Any) -> None:
    with pytest.raises(StageFailure, match=r"raise teacher\.sampling\.maxTokens") as failed:
        await examine(Endpoint("teach", reasoning="Hm", content=None, finish="length"))
    assert failed.value.reason == "TeacherTruncates"


LABELS = {"topLogprobs": 3}


async def test_a_teacher_that_tells_the_students_tokens_is_fit_for_soft_targets(examine: Any) -> None:
    teacher, student = Endpoint("teach", token="token_id:1"), Endpoint(STUDENT)
    checks = await examine(teacher, student, labels=LABELS)
    assert checks["teacher.logprobs"] == "3 at each token, which are the student's"
    assert {(body["top_logprobs"], body["return_tokens_as_token_ids"]) for body in teacher.requests} == {(3, True)}
    assert not any("logprobs" in body for body in student.requests)
    assert not any("warning" in what for what in checks.values())


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "does not tell the log-probabilities"),
        ("ls", "by token ids"),
        ("token_id:0", "token ids for 'ls' read 'cat' under the student's"),
    ],
)
async def test_a_teacher_that_tells_none_or_others_makes_hard_targets(examine: Any, token: str | None, said: str) -> None:
    checks = await examine(Endpoint("teach", token=token), labels=LABELS)
    assert checks["teacher.logprobs"].startswith("warning: ") and said in checks["teacher.logprobs"]
    assert checks["teacher.logprobs"].endswith("; labels are hard targets")


@pytest.mark.parametrize(("token", "said"), [(None, "does not tell the log-probabilities"), ("token_id:0", "it has another one")])
async def test_a_run_that_learns_them_stops_at_such_a_teacher(examine: Any, token: str | None, said: str) -> None:
    with pytest.raises(StageFailure, match=rf"{said}.*write training\.loss CrossEntropy") as failed:
        await examine(Endpoint("teach", token=token), labels=LABELS, training={"loss": "ForwardKL"})
    assert (failed.value.reason, failed.value.permanent) == ("TeacherTellsNoSoftTargets", True)


async def test_an_endpoint_that_refuses_to_be_asked_for_them_says_which_field(examine: Any) -> None:
    with pytest.raises(StageFailure, match=r"look at teacher\.sampling and labels\.topLogprobs, which it may not support"):
        await examine(Endpoint("teach", status=400), labels=LABELS)


async def test_a_reasoning_model_can_be_a_teacher_and_says_how(examine: Any, document: dict[str, Any]) -> None:
    named = {"maxTokensParameter": "MaxCompletionTokens"}
    with pytest.raises(StageFailure, match=r"write teacher\.endpoint\.maxTokensParameter MaxCompletionTokens"):
        await examine(Endpoint("teach", reasons=True))
    with pytest.raises(StageFailure, match=r"'temperature'.*teacher\.sampling \(a temperature or topP of 1 is not sent\)"):
        await examine(Endpoint("teach", reasons=True), endpoint=named)
    teacher = Endpoint("teach", reasons=True)
    document["spec"]["teacher"]["sampling"] |= {"temperature": 1, "topP": 1}
    await examine(teacher, endpoint=named)
    assert {request["max_completion_tokens"] for request in teacher.requests} == {64}


async def test_streams_are_needed_by_a_command_scaffold_alone(examine: Any) -> None:
    checks = await examine(Endpoint("teach", stream=False))
    assert checks["teacher.streaming"].startswith("warning")


async def test_a_command_scaffold_needs_streams(examine: Any) -> None:
    with pytest.raises(StageFailure, match="use an endpoint that has them") as failed:
        await examine(Endpoint("teach", stream=False), scaffold={"type": "Command", "command": ["agent"]})
    assert failed.value.reason == "TeacherDoesNotStream"


async def test_replicas_with_other_weights_stop_the_run(examine: Any) -> None:
    with pytest.raises(StageFailure, match="hold different weights") as failed:
        await examine(Endpoint("teach"), Endpoint(STUDENT), Endpoint(STUDENT, weights="others"))
    assert failed.value.reason == "StudentReplicasDisagree"


async def test_a_teacher_with_a_shorter_context_than_the_student_is_noted(examine: Any) -> None:
    checks = await examine(Endpoint("teach", length=1000), Endpoint(STUDENT, length=4096))
    assert "get no label" in checks["teacher.context"]
