"""One reader decides what runs, what trains, and what counts as agreement."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import Protocol, Scaffold, ScaffoldType
from dagger_operator.rollout.actions import NoAction, action_reader
from dagger_operator.rollout.templates import templates
from dagger_operator.store.records import Message
from dagger_operator.store.stage import StageFailure

TEXT = action_reader(Scaffold())
TOOLS = action_reader(Scaffold(protocol=Protocol.TOOL_CALL))


def block(command: str) -> str:
    return f"THOUGHT: I think.\n\n```mswea_bash_command\n{command}\n```"


def says(content: str) -> Message:
    return {"role": "assistant", "content": content}


def calls(*arguments: Any, name: str = "bash") -> Message:
    each = [a if isinstance(a, str) else json.dumps(a) for a in arguments]
    tool_calls = [{"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": a}} for i, a in enumerate(each)]
    return {"role": "assistant", "content": None, "tool_calls": tool_calls}


@given(st.text(alphabet=st.characters(exclude_characters="`", exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_text_gives_the_command_inside_the_block(command: str) -> None:
    assert TEXT.read(says(block(command))) == (command.strip(),)


@pytest.mark.parametrize("content", ["", "no block", block("ls") + block("pwd"), "```bash\nls\n```"])
def test_text_without_exactly_one_action_has_a_flaw(content: str) -> None:
    assert re.search("Expected exactly 1 action, found [02]", TEXT.flaw(says(content)) or "")
    with pytest.raises(NoAction):
        TEXT.read(says(content))


def test_tool_calls_give_their_commands_in_order() -> None:
    assert TOOLS.read(calls({"command": "ls"}, {"command": "pwd"})) == ("ls", "pwd")


@pytest.mark.parametrize(
    ("message", "flaw"),
    [
        (says("only words"), "No tool calls"),
        (calls("{not json"), "Error parsing tool call arguments"),
        (calls({"cmd": "ls"}), "Missing 'command'"),
        (calls({"command": "ls"}, name="python"), "Unknown tool 'python'"),
        (calls({"command": "ls"}, "{}"), "Missing 'command'"),
    ],
)
def test_a_tool_call_that_cannot_be_run_is_a_flaw(message: Message, flaw: str) -> None:
    assert flaw in (TOOLS.flaw(message) or "")


def test_agreement_is_about_actions_and_not_about_words() -> None:
    assert TEXT.agree(says("Hm." + block("ls -l")), says(block(" ls -l")))
    assert not TEXT.agree(says(block("ls")), says(block("pwd")))
    assert not TEXT.agree(says("nothing"), says("nothing"))


def test_own_regex_reads_the_whole_message() -> None:
    reader = action_reader(Scaffold(action_regex=r"\A(.+)\Z"))
    assert reader.read(says("grep -n def a.py")) == ("grep -n def a.py",)
    assert reader.flaw(says("")) is not None


def test_a_command_scaffold_brings_its_own_protocol() -> None:
    own = {"type": ScaffoldType.COMMAND, "command": ["agent"]}
    tools = action_reader(Scaffold(**own, protocol=Protocol.TOOL_CALL))
    assert tools.agree(calls('{"a": 1, "b": 2}', name="edit"), calls('{"b":2,"a":1}', name="edit"))
    assert not tools.agree(calls({"a": 1}, name="edit"), calls({"a": 1}, name="view"))
    assert tools.flaw(says("words")) == "no tool calls in the message"
    assert "no JSON" in (tools.flaw(calls("{")) or "")
    assert action_reader(Scaffold(**own)).read(says(" anything ")) == ("anything",)
    assert action_reader(Scaffold(**own, action_regex="<do>(.*?)</do>")).read(says("so <do>x</do>")) == ("x",)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("instance_template", "{{ task", "spec.scaffold.instanceTemplate cannot be rendered"),
        ("system_template", "{{ nonsense }}", "'nonsense' is undefined; it may use: task"),
        ("observation_template", "{{ output.colour }}", "spec.scaffold.observationTemplate"),
        ("format_error_template", "{{ mistake }}", "it may use: actions, error, finish_reason, has_tool_calls"),
        ("action_regex", "(", "is no regular expression"),
        ("action_regex", "(a)(b)", "has 2 groups"),
    ],
)
def test_a_scaffold_that_cannot_work_ends_the_stage_and_names_the_field(field: str, value: str, problem: str) -> None:
    with pytest.raises(StageFailure) as caught:
        templates(Scaffold(**{field: value}))
    assert caught.value.reason == "InvalidScaffold"
    assert problem in caught.value.message
