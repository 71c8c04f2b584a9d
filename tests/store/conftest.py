"""Stores on a local folder and on a real S3 server, and made-up trajectories."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from dagger_operator.api import DAggerRun, Role, Storage, load
from dagger_operator.store.credentials import OwnIdentity
from dagger_operator.store.logprobs import TopLogprobs
from dagger_operator.store.objects import Store
from dagger_operator.store.records import Completion, Failure, LabelFlaw, Outcome, Timings, Trajectory, Turn


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.heavy)])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, dict[str, str]]:
    """What a process needs to open the store of this test."""
    if request.param == "folder":
        return Storage(url=f"file://{tmp_path}/a%20run"), {}
    s3 = request.getfixturevalue("s3")
    return s3.storage, s3.environ


@pytest.fixture
def store(settings: tuple[Storage, dict[str, str]]) -> Store:
    storage, environ = settings
    return Store.open(storage, OwnIdentity(environ))


@pytest.fixture
def document(settings: tuple[Storage, dict[str, str]]) -> dict[str, Any]:
    """A run on this test's store, as YAML would give it."""
    return {
        "metadata": {"name": "a-run", "namespace": "team", "uid": "1234"},
        "spec": {
            "student": {"model": "tiny"},
            "teacher": {"model": "big", "endpoint": {"url": "http://127.0.0.1:1/v1"}},
            "tasks": {"source": {"type": "JSONL", "uri": "a.jsonl"}, "heldOut": {"source": {"type": "JSONL", "uri": "b.jsonl"}}},
            "storage": settings[0].wire(),
        },
    }


@pytest.fixture
def run(document: dict[str, Any]) -> DAggerRun:
    return load(document)


@pytest.fixture(scope="session")
def made_up() -> st.SearchStrategy[Trajectory]:
    """Any trajectory."""
    return _trajectories


@pytest.fixture(scope="session")
def rollout() -> Callable[..., Trajectory]:
    """A plausible trajectory of a rollout; what a worker alone would add differs from call to call."""
    calls = itertools.count(1)

    def make(rollout_id: str, *, turns: int = 3, round: int = 1, task_id: str = "task-1", size: int = 20, **more: Any) -> Trajectory:
        call = next(calls)
        said = [
            Completion(
                message={"role": "assistant", "content": f"{rollout_id} turn {index} " + "x" * size},
                policy="r000-aaaaaaaaaaaa" if index else "teacher-1",
                finish_reason="stop",
                prompt_tokens=10 * index,
                completion_tokens=5,
                cached_tokens=call,
                latency_seconds=call / 7,
            )
            for index in range(turns)
        ]
        return Trajectory(
            **{
                "run": "a-run",
                "round": round,
                "rollout_id": rollout_id,
                "task_id": task_id,
                "student": "r000-aaaaaaaaaaaa",
                "turns": tuple(
                    Turn(
                        index=index,
                        actor=Role.STUDENT if index else Role.TEACHER,
                        beta=0.6,
                        coin=0.9 if index else 0.1,
                        kept=2 * index if index else 0,
                        messages=({"role": "user", "content": f"observation {index}"},)
                        if index
                        else ({"role": "system"}, {"role": "user"}),
                        action=action,
                        label=action,
                    )
                    for index, action in enumerate(said)
                ),
                "outcome": Outcome.RESOLVED,
                "tries": call,
                "worker": f"rollout-{call:04d}",
                "timings": Timings(started_at=1e9 + call, total=call),
                **more,
            }
        )

    return make


_names = st.text("abcdefghij0123456789-", min_size=1, max_size=12)
# Whatever a model or a tool may print: control characters, lone surrogates, emoji.
_texts = st.text(max_size=40)
_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_messages = st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name", "reasoning"]), _json, max_size=4)
_tokens = st.integers(0, 10**7)
_seconds = st.floats(0, 1e6)
_shares = st.floats(0, 1)
_said: dict[str, st.SearchStrategy[Any]] = {
    "message": _messages,
    "policy": _names,
    "finish_reason": _names,
    "prompt_tokens": _tokens,
    "cached_tokens": _tokens,
    "completion_tokens": _tokens,
    "latency_seconds": _seconds,
}


@st.composite
def _told(draw: st.DrawFn) -> TopLogprobs:
    tokens, k = draw(st.integers(0, 4)), draw(st.integers(1, 20))

    def some(one: st.SearchStrategy[Any], size: int) -> list[Any]:
        return draw(st.lists(one, min_size=size, max_size=size))

    ids = st.integers(0, 2**31 - 1)
    return TopLogprobs(
        token_ids=some(ids, tokens), top_ids=some(ids, k * tokens), top_logprobs=some(st.floats(-9999, 0, width=32), k * tokens)
    )


_completions = st.builds(Completion, **_said)
_labels = st.builds(Completion, **_said, logprobs=st.none() | _told())
_turns = st.builds(
    Turn,
    index=st.integers(0, 10**6),
    actor=st.sampled_from(Role),
    beta=_shares,
    coin=_shares,
    kept=st.integers(0, 10**6),
    messages=st.lists(_messages, max_size=3).map(tuple),
    tools=st.none() | st.lists(_messages, max_size=2).map(tuple),
    action=_completions,
    label=st.none() | _labels,
    label_flaw=st.none() | st.sampled_from(LabelFlaw),
)
_trajectories = st.builds(
    Trajectory,
    run=_names,
    round=st.integers(1, 10**4),
    rollout_id=_names,
    task_id=_names,
    attempt=st.integers(0, 64),
    student=_names,
    teacher=_names,
    kappa=st.none() | st.integers(0, 1000),
    turns=st.lists(_turns, max_size=4).map(tuple),
    outcome=st.sampled_from(Outcome),
    exit_status=_names,
    submitted=st.booleans(),
    patch=st.text(st.characters(codec="utf-8"), max_size=40),
    failure=st.none() | st.builds(Failure, reason=_names, message=_names),
    tries=st.integers(1, 100),
    worker=_names,
    timings=st.builds(Timings, started_at=_seconds, total=_seconds),
)
