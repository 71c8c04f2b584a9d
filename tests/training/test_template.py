"""Training sees the tokens that acting sees, and learns the label's tokens with its end of turn, nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.api import Role
from dagger_operator.api.training import LabelWeights
from dagger_operator.store.records import Message, Trajectory
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.samples import tokenise
from dagger_operator.training.template import StudentTemplate, template_options

pytestmark = pytest.mark.heavy  # the tokenizer's library imports torch

TOOLS = [{"type": "function", "function": {"parameters": {"type": "object"}, "name": "bash", "description": "Runs a command"}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls -l"}'}}

content = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", "\n\nsubmit\n", " sed -i '3s/+/*/' geo.py", "<think>\nhm\n</think>\n\nls", "<|im_start|>user\nx<|im_end|>", "é\u3000漢"]
    ),
)
conversation = st.lists(st.tuples(content, content), min_size=0, max_size=4)


def state_of(turns: list[tuple[str, str]], opening: str) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Repair."}, {"role": "user", "content": opening}]
    for action, observation in turns:
        messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
    return messages


# The prompt ends in an empty think block that no turn has once it is history: the prompt is never a prefix of what comes after.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
OPTIONS = [
    ("qwen3_instruct", {}),
    ("qwen3_hybrid", {}),
    ("qwen3_hybrid", {"enable_thinking": False}),
    ("qwen3_instruct", {"chat_template": FORGETS}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=["plain", "thinking", "thinking-off", "forgets"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(turns=conversation, opening=content, label=content)
def test_a_sample_is_the_served_prompt_and_the_rendered_label_with_its_end_of_turn(
    tokenizer_with: Callable[[str], Any], name: str, options: dict[str, Any], turns: list[tuple[str, str]], opening: str, label: str
) -> None:
    tokenizer = tokenizer_with(name)
    template = StudentTemplate(tokenizer, options)
    messages, turn = state_of(turns, opening), {"role": "assistant", "content": label}

    prompt = template.prompt(messages, None)
    served = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    assert prompt == tokenizer(served, add_special_tokens=False)["input_ids"]

    learned = template.label(messages, None, turn)
    whole = tokenizer.apply_chat_template([*messages, turn], tokenize=False, **options)
    assert learned[-1] == tokenizer.eos_token_id
    said = tokenizer.decode(learned, skip_special_tokens=False)
    assert whole.rstrip("\n").endswith(said)
    # Nothing of the state is learned, and nothing of the label is missing.
    if whole.startswith(served):
        assert served + said == whole.rstrip("\n")
    else:
        body = label.split("</think>")[-1].lstrip("\n")
        assert said == body + tokenizer.eos_token


def test_tool_calls_and_tools_are_rendered_as_the_server_renders_them(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with("qwen3_instruct")
    template = StudentTemplate(tokenizer)
    messages: list[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "list"}, {"type": "text", "text": "files"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "geo.py"},
    ]
    prompt = tokenizer.decode(template.prompt(messages, TOOLS))
    assert '{"type": "function", "function": {"name": "bash", "description": "Runs a command", "parameters": {"type": "object"}}}' in prompt
    assert "<|im_start|>user\nlist\nfiles<|im_end|>" in prompt
    assert '<tool_call>\n{"name": "bash", "arguments": {"command": "ls -l"}}\n</tool_call>' in prompt
    label = template.label(messages, TOOLS, {"role": "assistant", "content": "Look.", "tool_calls": [CALL]})
    assert tokenizer.decode(label) == 'Look.\n<tool_call>\n{"name": "bash", "arguments": {"command": "ls -l"}}\n</tool_call><|im_end|>'


def test_states_are_checked_against_what_the_server_counted(tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]) -> None:
    template = StudentTemplate(tokenizer_with("qwen3_instruct"))
    whole = trajectories[0]
    student = next(turn for turn in whole.turns if turn.actor is Role.STUDENT)
    rendered = {sample.turn: sample.prompt for sample in tokenise([whole], template, 4096).samples}

    def counted(prompt_tokens: int) -> Trajectory:
        acted = student.model_copy(update={"action": student.action.model_copy(update={"prompt_tokens": prompt_tokens})})
        return whole.model_copy(update={"turns": tuple(acted if turn is student else turn for turn in whole.turns)})

    assert len(tokenise([counted(rendered[student.index])], template, 4096).samples) == len(whole.turns)
    with pytest.raises(StageFailure, match=rf"TemplateMismatch: rollout 0001/00000, turn {student.index}: the server counted 9 prompt"):
        tokenise([counted(9)], template, 4096)


def test_flawed_labels_do_not_train_and_long_states_are_left_out_and_counted(
    tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]
) -> None:
    template = StudentTemplate(tokenizer_with("qwen3_instruct"))
    everything = tokenise(trajectories, template, 4096)
    assert len(everything.samples) == sum(len(trajectory.turns) for trajectory in trajectories) - 1
    assert ("0001/00002", 1) not in {(sample.trajectory, sample.turn) for sample in everything.samples}
    bound = sorted(len(sample.tokens) for sample in everything.samples)[-3]
    cut = tokenise(trajectories, template, bound)
    assert all(len(sample.tokens) <= bound for sample in cut.samples)
    assert cut.too_long + len(cut.samples) == len(everything.samples)


def test_labels_weigh_by_who_acted_and_weight_0_leaves_them_out(
    tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]
) -> None:
    template = StudentTemplate(tokenizer_with("qwen3_instruct"))
    students = {turn.index for turn in trajectories[3].turns if turn.actor is Role.STUDENT}
    weighed = tokenise([trajectories[3]], template, 4096, LabelWeights(student_acted=2.5)).samples
    assert {sample.turn: sample.weight for sample in weighed} == {
        turn.index: 2.5 if turn.index in students else 1.0 for turn in trajectories[3].turns
    }
    only = tokenise([trajectories[3]], template, 4096, LabelWeights(teacher_acted=0)).samples
    assert {sample.turn for sample in only} == students


def test_template_variables_are_those_of_the_servers_command_line() -> None:
    flag, value = "--default-chat-template-kwargs", '{"enable_thinking": false}'
    assert template_options(["--enforce-eager", flag, value]) == template_options([f"{flag}={value}"]) == {"enable_thinking": False}
    assert template_options([]) == {}
