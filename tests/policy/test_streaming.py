"""A stream adds up to the answer, wherever it was cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.policy.streaming import Assembler, EventParser, chunks_of
from dagger_operator.policy.wire import InvalidWire

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
calls = st.lists(st.tuples(text.filter(bool), text.filter(bool), text), max_size=3)


def answer_of(content: str, reasoning: str, tool_calls: list[tuple[str, str, str]]) -> dict:
    message = {"role": "assistant", "content": content or (None if tool_calls else ""), "reasoning_content": reasoning}
    if tool_calls:
        message["tool_calls"] = [{"id": i, "type": "function", "function": {"name": n, "arguments": a}} for i, n, a in tool_calls]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if tool_calls else "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": {"prompt_tokens": 1}}


def shredded(answer: dict, size: int) -> list[dict]:
    """An answer as a stream whose every text, tool names and arguments included, comes in pieces of `size` characters."""
    message = answer["choices"][0]["message"]
    deltas: list[dict] = [{"role": "assistant"}]
    for name in ("reasoning_content", "content"):
        value = message[name] or ""
        deltas += [{name: value[i : i + size]} for i in range(0, max(1, len(value)), size)]
    for index, call in enumerate(message.get("tool_calls", [])):
        deltas.append({"tool_calls": [{"index": index, "id": call["id"], "type": "function"}]})
        for name in ("name", "arguments"):
            value = call["function"][name]
            deltas += [{"tool_calls": [{"index": index, "function": {name: value[i : i + size]}}]} for i in range(0, len(value), size)]
    head = {"id": "1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    chunks = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = [head | {"choices": [{"index": 0, "delta": {}, "finish_reason": answer["choices"][0]["finish_reason"]}]}]
    return chunks + end + [head | {"choices": [], "usage": answer["usage"]}]


@given(text, text, calls, st.integers(1, 7), st.integers(1, 40), st.sampled_from(["\n", "\r\n"]))
def test_any_cut_of_any_stream_adds_up_to_the_answer(content, reasoning, tool_calls, characters, size, newline):
    answer = answer_of(content, reasoning, tool_calls)
    events = [json.dumps(chunk, ensure_ascii=False) for chunk in shredded(answer, characters)] + ["[DONE]"]
    data = "".join(f": a comment{newline}data: {event}{newline}{newline}" for event in events).encode()
    parser, assembler = EventParser(), Assembler()
    received = [event for i in range(0, len(data), size) for event in parser.feed(data[i : i + size])]
    assert received[-1] == b"[DONE]"
    for event in received[:-1]:
        assembler.add(json.loads(event))
    assert assembler.answer() == answer


@given(text, text, calls)
def test_an_answer_survives_being_streamed_from_the_record(content, reasoning, tool_calls):
    answer = answer_of(content, reasoning, tool_calls)
    assembler = Assembler()
    for chunk in chunks_of(answer):
        assembler.add(chunk)
    assert assembler.answer() == answer


def test_tool_calls_without_an_index_are_told_apart_by_their_ids():
    assembler = Assembler()
    pieces = [
        {"id": "a", "function": {"name": "f", "arguments": "{"}},
        {"function": {"arguments": "}"}},
        {"id": "b", "function": {"name": "g"}},
    ]
    for piece in pieces:
        assembler.add({"choices": [{"delta": {"tool_calls": [piece]}}]})
    assembler.add({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    found = assembler.answer()["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in found] == [("a", "f", "{}"), ("b", "g", "")]


def test_a_stream_that_ends_before_its_turn_is_no_answer():
    assembler = Assembler()
    assembler.add({"choices": [{"delta": {"content": "half of"}}]})
    with pytest.raises(InvalidWire, match="without a finish_reason"):
        assembler.answer()


@pytest.mark.parametrize(
    "chunk", [{}, {"choices": 3}, {"choices": [7]}, {"choices": [{"delta": "x"}]}, {"choices": [{"delta": {"tool_calls": [3]}}]}]
)
def test_what_is_no_chunk_is_refused(chunk):
    with pytest.raises(InvalidWire):
        Assembler().add(chunk)
