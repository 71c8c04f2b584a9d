"""Any OpenAI client works unchanged: the base URL and the key are all it is given."""

import asyncio
import json
import os
import sys

import openai
import pytest
from aiohttp import web

from dagger_operator.api import Mixing, Schedule, ScheduleType

STATE = [{"role": "user", "content": "task"}]
BASH = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}}}
ARGUMENTS = json.dumps({"command": "echo 'grüße' && ls"}, ensure_ascii=False)
STUDENT_ALONE = Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=0.0))


def client_of(session, **options):
    return openai.AsyncOpenAI(base_url=session.base_url, api_key=session.token, **options)


async def test_plain_completions_and_the_list_of_models(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE)
        async with client_of(session) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
            answer = await client.chat.completions.create(model="gpt-x", messages=STATE, temperature=1.5, max_tokens=1)
        recording = await session.finish()
    assert answer.choices[0].message.content == "student at 1"
    assert answer.model == "gpt-x"
    assert answer.usage.prompt_tokens == 10
    assert (student.requests[0]["temperature"], student.requests[0]["max_tokens"]) == (0.7, 64)
    assert len(recording.turns) == 1


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
async def test_streamed_tool_calls_cut_in_odd_places(student, teacher, rig, cut):
    async def calls(stub, http, request):
        head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
        pieces = [{"index": 0, "id": "call-1", "type": "function", "function": {"name": "bash", "arguments": ""}}]
        pieces += [{"index": 0, "function": {"arguments": ARGUMENTS[i : i + 3]}} for i in range(0, len(ARGUMENTS), 3)]
        deltas = [
            {"role": "assistant", "reasoning_content": "let me "},
            {"reasoning_content": "look"},
            *({"tool_calls": [p]} for p in pieces),
        ]
        chunks = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        chunks.append(head | {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}})
        return await stub.stream(http, chunks, cut=cut)

    student.script.append(calls)
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE)
        async with (
            client_of(session) as client,
            client.chat.completions.stream(model="m", messages=STATE, tools=[BASH], stream_options={"include_usage": True}) as stream,
        ):
            final = await stream.get_final_completion()
        recording = await session.finish()
    (call,) = final.choices[0].message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("call-1", "bash", ARGUMENTS)
    assert final.usage.completion_tokens == 5
    assert student.requests[0]["tools"] == [BASH]
    action = recording.turns[0].action
    assert action.message == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "let me look",
        "tool_calls": [{"id": "call-1", "type": "function", "function": {"name": "bash", "arguments": ARGUMENTS}}],
    }
    assert (action.finish_reason, action.prompt_tokens, action.completion_tokens) == ("tool_calls", 7, 5)


async def test_a_stream_arrives_while_it_is_made(student, teacher, rig):
    """The first chunk is read while the policy still waits to send its second."""
    read = asyncio.Event()

    async def waits(stub, http, request):
        first, *rest = stub.chunks(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        await response.write(f"data: {json.dumps(first)}\n\n".encode())
        await read.wait()
        for chunk in rest:
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    student.script.append(waits)
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE)
        async with client_of(session) as client:
            text = ""
            async for chunk in await client.chat.completions.create(model="m", messages=STATE, stream=True):
                read.set()
                assert chunk.choices, "token counts come only where they were asked for"
                text += chunk.choices[0].delta.content or ""
        assert text == "student at 1"
        assert len((await session.finish()).turns) == 1


async def test_a_streamed_turn_read_again_is_the_same_turn(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE)
        texts = []
        async with client_of(session) as client:
            for _ in range(2):
                stream = await client.chat.completions.create(model="m", messages=STATE, stream=True)
                texts.append("".join([chunk.choices[0].delta.content or "" async for chunk in stream]))
            whole = await client.chat.completions.create(model="m", messages=STATE)
        recording = await session.finish()
    assert [*texts, whole.choices[0].message.content] == ["student at 1"] * 3
    assert len(recording.turns) == len(student.requests) == 1


async def test_a_stream_that_breaks_is_an_error_to_the_client_and_a_failure_of_the_rollout(student, teacher, rig):
    async def half(stub, http, request):
        return await stub.stream(http, stub.chunks(request)[:3])

    student.always = half
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE)
        async with client_of(session) as client:
            with pytest.raises(openai.APIConnectionError):
                async for _ in await client.chat.completions.create(model="m", messages=STATE, stream=True):
                    pass
        recording = await session.finish()
    assert (recording.failure.reason, recording.turns) == ("BrokenStream", ())


async def test_openais_own_retries_do_not_multiply_a_failure(student, teacher, rig):
    async with rig(student, teacher) as r:
        session = r.open(mixing=STUDENT_ALONE, max_turns=1)
        async with client_of(session, max_retries=5) as client:
            await client.chat.completions.create(model="m", messages=STATE)
            with pytest.raises(openai.BadRequestError, match="n: a turn is one action"):
                await client.chat.completions.create(model="m", messages=STATE, n=3)
            with pytest.raises(openai.ConflictError, match="has had its 1 turns"):
                await client.chat.completions.create(model="m", messages=[*STATE, *STATE])


MINI_SWE_AGENT = """
import json, sys
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel

base_url, token, folder = sys.argv[1:]
options = {"api_base": base_url, "api_key": token}
model = LitellmModel(model_name="openai/policy", model_kwargs=options, cost_tracking="ignore_errors")
templates = {"system_template": "You repair software.", "instance_template": "Task: {{task}}"}
agent = DefaultAgent(model, LocalEnvironment(cwd=folder), cost_limit=0, **templates)
print(json.dumps(agent.run("write a greeting")))
"""


@pytest.mark.heavy
async def test_mini_swe_agent_runs_against_it_unchanged(student, teacher, rig, tmp_path):
    """Its own agent, its own LiteLLM model and its own local environment, in a process of their own."""

    async def acts(stub, http, request):
        turns = sum(message["role"] == "assistant" for message in request["messages"])
        command = "echo hello > greeting" if turns == 0 else "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat greeting"
        call = {"id": f"call-{turns}", "type": "function", "function": {"name": "bash", "arguments": json.dumps({"command": command})}}
        return web.json_response(stub.answer(request, content=None, tool_calls=[call]))

    student.always = teacher.always = acts
    quiet = {"MSWEA_SILENT_STARTUP": "1", "MSWEA_GLOBAL_CONFIG_DIR": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    async with rig(student, teacher) as r:
        session = r.open()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MINI_SWE_AGENT, session.base_url, session.token, str(tmp_path)),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | quiet,
        )
        output, _ = await process.communicate()
        recording = await session.finish()
    assert process.returncode == 0
    result = json.loads(output.decode().splitlines()[-1])
    assert (result["exit_status"], result["submission"].strip()) == ("Submitted", "hello")
    assert len(recording.turns) == 2
    assert all(turn.label is not None for turn in recording.turns)
    assert recording.turns[0].tools is not None
