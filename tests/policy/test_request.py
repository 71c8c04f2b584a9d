"""What a scaffold may ask, and what is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.policy.request import UnsupportedRequest, chat_request
from dagger_operator.policy.wire import InvalidWire, parse

STATE = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 5),
        ("functions", [{"name": "f"}]),
        ("logit_bias", {"7": 100}),
        ("best_of", 3),
        ("messages", []),
        ("messages", ["hello"]),
        ("messages", [{"content": "no role"}]),
        ("tools", "bash"),
        ("tools", ["bash"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedRequest, match=rf"^{field}: ") as caught:
        chat_request({"messages": STATE, field: value})
    assert caught.value.field == field


def test_what_client_libraries_send_by_themselves_is_fine():
    request = chat_request(
        {
            "model": "gpt-x",
            "messages": [{"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "audio": None}],
            "n": 1,
            "stream": False,
            "tools": None,
            "logprobs": False,
            "temperature": 1.9,
            "max_tokens": 1,
            "user": "me",
            "stop": ["\n\n"],
        }
    )
    assert request.messages == ({"role": "assistant", "content": None, "tool_calls": []},)
    assert request.options == {"stop": ["\n\n"]}
    assert request.tools == ()


def test_streaming_and_model_name_do_not_make_it_another_turn():
    assert chat_request({"messages": STATE, "stream": True, "model": "a"}) == chat_request({"messages": STATE, "model": "b"})
    assert chat_request({"messages": STATE}) != chat_request({"messages": STATE, "stop": ["x"]})
    assert chat_request({"messages": STATE}) != chat_request({"messages": STATE, "tools": [{"type": "function"}]})


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff\xfe", b"null", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(InvalidWire):
        parse(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_whatever_is_parsed_can_be_stored_as_utf8_and_keeps_all_that_could_be(value):
    parsed = parse(json.dumps(value).encode())
    json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return
    assert parsed == value
