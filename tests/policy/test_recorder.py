"""States survive their delta encoding, and cost O(turns)."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Role
from dagger_operator.policy.mixing import Decision
from dagger_operator.policy.recorder import Label, Recorder
from dagger_operator.policy.request import ChatRequest
from dagger_operator.store.records import Completion, LabelFlaw, Outcome, Trajectory, labelled_states, states

messages = st.lists(st.sampled_from(["a", "b", "c"]).map(lambda text: {"role": "user", "content": text}), min_size=1, max_size=6)
tools = st.sampled_from([(), ({"type": "function", "function": {"name": "bash"}},), ({"type": "function", "function": {"name": "edit"}},)])
STUDENT = Decision(Role.STUDENT, 0.5, 0.7)


def completion(text: str) -> Completion:
    return Completion(message={"role": "assistant", "content": text}, policy="p", finish_reason="stop")


def trajectory(recorder: Recorder) -> Trajectory:
    return Trajectory(run="r", round=1, rollout_id="0", task_id="t", student="p", turns=recorder.labelled(), outcome=Outcome.UNRESOLVED)


@given(st.lists(st.tuples(messages, tools), min_size=1, max_size=8))
def test_every_state_comes_out_as_it_went_in(visited: list[tuple[list[dict[str, Any]], tuple[dict[str, Any], ...]]]):
    """States may grow, shrink, be rewritten or condensed, and tools may come, change and go."""
    recorder = Recorder()
    for state, schemas in visited:
        recorder.record(recorder.interned(ChatRequest(tuple(state), schemas)), STUDENT, completion("x"))
    out = [(list(state), schemas or ()) for _, state, schemas in states(trajectory(recorder))]
    assert out == [(state, schemas) for state, schemas in visited]


def test_a_growing_conversation_holds_and_stores_each_message_once():
    recorder, state, requests = Recorder(), [{"role": "user", "content": "task"}], []
    for number in range(100):
        requests.append(recorder.interned(ChatRequest(tuple(dict(message) for message in state), ())))
        recorder.record(requests[-1], STUDENT, completion("x"))
        state = [*state, {"role": "assistant", "content": "x"}, {"role": "user", "content": str(number)}]
    assert sum(len(turn.messages) for turn in recorder.turns) == 199
    assert len({id(message) for request in requests for message in request.messages}) == 199


def test_labels_may_come_in_any_order_and_flawed_ones_never_train():
    recorder = Recorder()
    for number in range(4):
        recorder.record(ChatRequest(({"role": "user", "content": str(number)},), ()), STUDENT, completion("x"))
    recorder.labels[2] = Label(completion("two"), None)
    recorder.labels[0] = Label(completion("cut"), LabelFlaw.TRUNCATED)
    recorder.labels[1] = Label(None, LabelFlaw.REQUEST_FAILED)
    trained = list(labelled_states(trajectory(recorder)))
    assert [(sample.turn, sample.label["content"]) for sample in trained] == [(2, "two")]
    assert [turn.label_flaw for turn in recorder.labelled()] == [LabelFlaw.TRUNCATED, LabelFlaw.REQUEST_FAILED, None, None]
