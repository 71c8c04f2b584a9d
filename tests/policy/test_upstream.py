"""Student and teacher as a stage's environment describes them."""

import json
from hashlib import sha256

import pytest

from dagger_operator.policy.upstream import SERVED_TIMEOUT_SECONDS, upstreams
from dagger_operator.store import layout
from dagger_operator.store.results import PreflightResult
from dagger_operator.store.stage import Stage, StageFailure

TEACHER_URL = "https://teacher.example/v1"


def stage(folder, teacher, **environment):
    source = {"type": "JSONL", "uri": "tasks.jsonl"}
    spec = {
        "student": {"model": "Qwen/Qwen3-4B", "sampling": {"temperature": 0.4, "topP": 0.8, "maxTokens": 128}},
        "teacher": {"model": "big", **teacher},
        "tasks": {"source": source, "heldOut": {"source": {"type": "JSONL", "uri": "held-out.jsonl"}}},
        "labels": {"attempts": 4, "topLogprobs": 8},
        "storage": {"url": f"file://{folder}"},
    }
    defaults = {
        "DAGGER_RUN": json.dumps({"metadata": {"name": "r"}, "spec": spec}),
        "DAGGER_POLICY": "r002-0123456789ab",
        "DAGGER_STUDENT_URL": "http://127.0.0.2:8000/v1/, http://127.0.0.3:8000/v1",
        "DAGGER_TEACHER_URL": TEACHER_URL,
    }
    return Stage.from_environment({name: value for name, value in (defaults | environment).items() if value is not None})


ENDPOINT = {"endpoint": {"url": TEACHER_URL, "model": "gpt-x", "timeoutSeconds": 33, "maxTokensParameter": "MaxCompletionTokens"}}


async def test_a_served_student_and_a_teacher_behind_an_endpoint(tmp_path):
    student, teacher = await upstreams(stage(tmp_path, ENDPOINT, DAGGER_TEACHER_TOKEN="key"), greedy=False)
    assert student.urls == ("http://127.0.0.2:8000/v1", "http://127.0.0.3:8000/v1")
    assert (student.top_logprobs, teacher.top_logprobs) == (0, 8)
    assert (student.max_tokens_parameter, teacher.max_tokens_parameter) == ("MaxTokens", "MaxCompletionTokens")
    assert (student.model, student.version, student.served) == ("r002-0123456789ab", "r002-0123456789ab", True)
    assert (student.sampling.temperature, student.attempts, student.timeout_seconds) == (0.4, 4, SERVED_TIMEOUT_SECONDS)
    assert (teacher.model, teacher.served, teacher.token, teacher.timeout_seconds) == ("gpt-x", False, "key", 33)
    assert teacher.version == f"endpoint-{sha256(f'{TEACHER_URL} gpt-x'.replace(' ', chr(10)).encode()).hexdigest()[:12]}"


async def test_a_secrets_key_is_sent_without_the_newline_behind_it_and_refused_with_one_inside(tmp_path):
    _, teacher = await upstreams(stage(tmp_path, ENDPOINT, DAGGER_TEACHER_TOKEN="key\n"), greedy=False)
    assert teacher.token == "key"
    _, teacher = await upstreams(stage(tmp_path, ENDPOINT, DAGGER_TEACHER_TOKEN="\n"), greedy=False)
    assert teacher.token is None
    with pytest.raises(StageFailure, match=r"teacher\.endpoint\.secretRef"):
        await upstreams(stage(tmp_path, ENDPOINT, DAGGER_TEACHER_TOKEN="key\nkey"), greedy=False)


async def test_a_served_teachers_version_is_what_preflight_found(tmp_path):
    serving = stage(tmp_path, {"serving": {"maxModelLen": 4096}})
    with pytest.raises(StageFailure, match="preflight") as caught:
        await upstreams(serving, greedy=False)
    assert not caught.value.permanent
    found = PreflightResult(student="r000-0123456789ab", teacher="r000-ba9876543210", checks={})
    await serving.store.create(layout.result(0, "preflight"), found.model_dump_json().encode())
    _, teacher = await upstreams(serving, greedy=False)
    assert (teacher.model, teacher.version, teacher.served) == ("r000-ba9876543210", "r000-ba9876543210", True)
    assert teacher.context == 4096


async def test_evaluation_is_greedy_and_asks_no_teacher(tmp_path):
    student, teacher = await upstreams(stage(tmp_path, ENDPOINT, DAGGER_TEACHER_URL=None), greedy=True)
    assert (student.sampling.temperature, student.sampling.top_p, student.sampling.max_tokens) == (0.0, 1.0, 128)
    assert teacher is None


@pytest.mark.parametrize("name", ["DAGGER_POLICY", "DAGGER_STUDENT_URL", "DAGGER_TEACHER_URL"])
async def test_what_the_environment_lacks_is_named(tmp_path, name):
    with pytest.raises(StageFailure, match=f"{name} is not set"):
        await upstreams(stage(tmp_path, ENDPOINT, **{name: None}), greedy=False)
