"""The student's chat template, applied exactly as the server applies it, so that training sees the same tokens as the acting student.

vLLM passes the template not the request's messages but a normalised form (`vllm/renderers/chat_utils.py`, 0.32): absent content is
the empty string, text parts are joined, arguments of tool calls are objects. The same is done here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dagger_operator.api.policies import server_argument
from dagger_operator.store.records import Message
from dagger_operator.store.stage import StageFailure

Tools = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """The parts of a Hugging Face tokenizer that are used."""

    eos_token: str

    @property
    def added_tokens_encoder(self) -> Mapping[str, int]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


class StudentTemplate:
    """Renders states and labels as the student's tokens.

    `options` are the template's own variables that the server sets, such as `enable_thinking`.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self._tokenise = _memo(lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self._openers = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._cuts, self._unchecked = True, 8

    def prompt(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        """Return the tokens of a state: what the student is given before its turn."""
        return self.tokens(self._render(messages, tools, prompt=True))

    def label(self, messages: Sequence[Message], tools: Tools | None, label: Message) -> list[int]:
        """Return the tokens of a turn at that state, ending with its end-of-turn token: what the student should have said.

        Raises `StageFailure` if the template does not render such a turn.
        """
        prompt = self._render(messages, tools, prompt=True)
        for turn in (label, _without_reasoning(label)):  # a prompt that closes the thinking leaves no room for the teacher's
            whole = self._render([*messages, turn], tools)
            if whole.startswith(prompt):
                text = whole[len(prompt) :]
                break
        else:
            # The template renders the state differently once a turn follows, for example dropping earlier thinking.
            text = self._alone(_without_reasoning(label), tools)
        end = text.rfind(self._tokenizer.eos_token)
        return self.tokens(text[:end] + self._tokenizer.eos_token if end >= 0 else text.rstrip("\n") + self._tokenizer.eos_token)

    def _alone(self, label: Message, tools: Tools | None) -> str:
        """Return a turn's own text, rendered as the first turn of a conversation: what follows the header that every turn has."""
        opening: list[Message] = [{"role": "user", "content": "."}]
        first, second = (self._render([*opening, {"role": "assistant", "content": probe}], tools) for probe in ("a", "b"))
        header = first[: next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)]
        whole = self._render([*opening, label], tools)
        if not whole.startswith(header):
            raise StageFailure(
                "TemplateUnsupported",
                "the student's chat template writes a turn with tool calls under another header than one with text: "
                "use a template in which every assistant turn begins alike",
            )
        return whole[len(header) :]

    def _render(self, messages: Sequence[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [_served(message) for message in messages],
                tools=[_served_tool(tool) for tool in tools] if tools else None,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._options,
            )
        except Exception as error:  # a template is third-party code: it may raise anything
            raise StageFailure(
                "TemplateFailed", f"the student's chat template refuses a conversation that was recorded: {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of rendered text.

        The tokenizer splits the text at added tokens first, so each message is tokenised only once although every later state renders it
        again. A tokenizer that looks across such a boundary is detected here, and its text is not split.
        """
        pieces = self._pieces(text)
        if len(pieces) == 1:
            return list(self._tokenise(text))
        ids = [token for piece in pieces for token in self._tokenise(piece)]
        if self._unchecked > 0:
            self._unchecked -= 1
            whole = self._tokenise(text)
            self._cuts = self._cuts and ids == whole
            return list(whole)
        return ids

    def _pieces(self, text: str) -> list[str]:
        opener = next((token for token in self._openers if text.startswith(token)), None) if self._cuts else None
        if opener is None:
            return [text]
        return [opener + piece for piece in text.split(opener)[1:]]


def _memo(function: Callable[[str], list[int]], entries: int = 4096) -> Callable[[str], list[int]]:
    """Cache the latest results; `functools.lru_cache` would keep every tokenizer alive."""
    known: dict[str, list[int]] = {}

    def remembered(text: str) -> list[int]:
        if (found := known.get(text)) is None:
            if len(known) >= entries:
                known.pop(next(iter(known)))
            found = known[text] = function(text)
        return found

    return remembered


def _served(message: Message) -> dict[str, Any]:
    """Return a message as the server passes it to the template."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    served: dict[str, Any] = {"role": message["role"], "content": content or ""}
    if message["role"] == "assistant":
        if calls := message.get("tool_calls"):
            served["tool_calls"] = [_served_call(call) for call in calls]
        if (reasoning := message.get("reasoning") or message.get("reasoning_content")) is not None:
            served["reasoning"] = served["reasoning_content"] = reasoning
    elif message["role"] == "tool" and "tool_call_id" in message:
        served["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        served["name"] = message["name"]
    return served


def _without_reasoning(message: Message) -> Message:
    """Return the turn as a student without visible reasoning would say it."""
    content = message.get("content")
    bare = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    return bare | {"content": content.rpartition("</think>")[2].lstrip("\n")} if isinstance(content, str) else bare


def _served_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}


def _served_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's schema with the field order and the absent fields of the server's model: templates print it as JSON."""
    given = tool["function"]
    function = {name: given.get(name) for name in ("name", "description", "parameters")}
    function |= {name: given[name] for name in ("strict", "defer_loading") if given.get(name) is not None}
    return {"type": tool.get("type", "function"), "function": function}


def template_options(server_arguments: Sequence[str]) -> dict[str, Any]:
    """Return the variables that a server's command line sets for every template: vLLM's `--default-chat-template-kwargs`."""
    options: dict[str, Any] = json.loads(server_argument(server_arguments, "--default-chat-template-kwargs") or "{}")
    return options
