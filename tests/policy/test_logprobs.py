"""A teacher's log-probabilities: asked for and kept with the label, and nothing of them for the scaffold or the student."""

import json

import pytest
from aiohttp import web

from dagger_operator.api import LabelMode, Mixing, Role, Schedule, ScheduleType
from dagger_operator.policy.client import completion_of
from dagger_operator.store.logprobs import TopLogprobs

STATE = [{"role": "user", "content": "task"}]
WANTED = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
TOLD = TopLogprobs(token_ids=[7, 8, 2], top_ids=[7, 1, 8, 7, 2, 8], top_logprobs=[-0.25, -2.0, -0.5, -1.0, 0.0, -9999.0])


def entries(named="token_id:{}"):
    """The teacher's answer as vLLM 0.32 tells it: the sampled token first."""

    def one(token, logprob):
        return {"token": named.format(token), "logprob": logprob, "bytes": [1]}

    rows = zip(TOLD.token_ids, zip(*2 * [iter(zip(TOLD.top_ids, TOLD.top_logprobs, strict=True))], strict=True), strict=True)
    return [one(token, top[0][1]) | {"top_logprobs": [one(*each) for each in top]} for token, top in rows]


def telling(content):
    """A policy that tells this whatever it is asked."""

    async def behave(stub, http, request):
        if request.get("stream"):
            chunks = stub.chunks(request)
            pieces = [content[:1], content[1:]]
            for chunk, piece in zip(chunks[1:3], pieces, strict=True):
                chunk["choices"][0]["logprobs"] = {"content": piece}
            return await stub.stream(http, chunks)
        answer = stub.answer(request)
        answer["choices"][0]["logprobs"] = {"content": content}
        return web.json_response(answer)

    return behave


def beta(value):
    return Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=value))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("mode", list(LabelMode))
async def test_labels_keep_what_the_teacher_tells_whoever_acted(student, teacher, rig, share, mode):
    teacher.always = telling(entries())
    async with rig(student, teacher, teacher_changes={"top_logprobs": 2}) as r:
        session = r.open(mixing=beta(share), labels=mode)
        status, answer = await r.ask(session, STATE)
        turn = (await session.finish()).turns[0]
        hard = r.registry.get_sample_value("dagger_gateway_hard_labels_total")
    assert (status, hard) == (200, 0)
    assert {name: teacher.requests[0].get(name) for name in WANTED} == WANTED
    assert not any(WANTED.keys() & request.keys() for request in student.requests)
    assert turn.label.logprobs == TOLD and turn.action.logprobs is None
    assert not answer["choices"][0].get("logprobs")
    if turn.actor is Role.TEACHER:
        assert turn.label.model_copy(update={"logprobs": None}) == turn.action and len(teacher.requests) == 1


async def test_a_streamed_turn_of_the_teacher_is_told_without_them_and_kept_with_them(student, teacher, rig):
    teacher.always = telling(entries())
    async with rig(student, teacher, teacher_changes={"top_logprobs": 2}) as r:
        session = r.open(mixing=beta(1.0))
        body = {"model": "any", "messages": STATE, "stream": True}
        async with r.http.post(
            f"{session.base_url}/chat/completions", json=body, headers={"Authorization": f"Bearer {session.token}"}
        ) as response:
            events = [line[6:] for line in (await response.text()).splitlines() if line.startswith("data: ")]
        turn = (await session.finish()).turns[0]
    assert {name: teacher.requests[0].get(name) for name in WANTED} == WANTED
    assert turn.label.logprobs == TOLD and turn.action.logprobs is None
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == turn.action.message["content"]
    assert not any("token_id" in event for event in events)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "much",
        [],
        [{}],
        entries("{}"),
        entries("token_id:{}x"),
        entries("token_id:99999999999{}"),
        [*entries()[:1], {"token": "token_id:1"}],
    ],
)
async def test_what_a_teacher_does_not_tell_makes_a_hard_label_and_no_error(student, teacher, rig, content):
    teacher.always = telling(content)
    async with rig(student, teacher, teacher_changes={"top_logprobs": 2}) as r:
        session = r.open(mixing=beta(1.0))
        assert (await r.ask(session, STATE))[0] == 200
        turn = (await session.finish()).turns[0]
        assert r.registry.get_sample_value("dagger_gateway_hard_labels_total") == 1
    assert turn.label.logprobs is None and turn.label_flaw is None


async def test_who_is_not_asked_for_any_keeps_none(student, teacher, rig):
    teacher.always = student.always = telling(entries())
    async with rig(student, teacher) as r:
        session = r.open(mixing=beta(0.0))
        assert (await r.ask(session, STATE))[0] == 200
        turn = (await session.finish()).turns[0]
        assert r.registry.get_sample_value("dagger_gateway_hard_labels_total") == 0
    assert turn.label.logprobs is None and turn.action.logprobs is None
    assert not any(WANTED.keys() & request.keys() for request in [*teacher.requests, *student.requests])


@pytest.mark.parametrize(("k", "kept"), [(1, 1), (2, 2), (5, 2)])
def test_as_many_are_kept_as_were_asked_for_and_told(k, kept):
    message = {"role": "assistant", "content": "x"}
    payload = {"choices": [{"message": message, "finish_reason": "stop", "logprobs": {"content": entries()}}]}
    found = completion_of(payload, "v", 0.0, k).logprobs
    assert found is not None and (found.k, found.token_ids) == (kept, TOLD.token_ids)
    assert found.top_logprobs.tolist()[:kept] == TOLD.top_logprobs.tolist()[:kept]
