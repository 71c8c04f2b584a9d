"""The record of a session's turns: states as deltas, each message stored once."""

from dataclasses import dataclass, field, replace
from typing import Any

from dagger_operator.policy.mixing import Decision
from dagger_operator.policy.request import ChatRequest
from dagger_operator.store.records import Completion, LabelFlaw, Message, Turn


def kept(before: tuple[Message, ...], now: tuple[Message, ...]) -> int:
    """Return the number of messages at the head of `before` that `now` still has."""
    count = 0
    for old, new in zip(before, now, strict=False):
        if old is not new and old != new:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Label:
    """The result of asking the teacher for its turn."""

    completion: Completion | None
    flaw: LabelFlaw | None


@dataclass
class Recorder:
    """Collects turns in order, and their labels in any order."""

    turns: list[Turn] = field(default_factory=list)
    labels: dict[int, Label] = field(default_factory=dict)
    _messages: tuple[Message, ...] = ()
    _tools: tuple[dict[str, Any], ...] = ()

    def interned(self, request: ChatRequest) -> ChatRequest:
        """Return the same request, reusing the previous state's messages: a rollout then holds each message once, not once per turn."""
        head = kept(self._messages, request.messages)
        return replace(request, messages=self._messages[:head] + request.messages[head:])

    def record(self, request: ChatRequest, decision: Decision, action: Completion) -> None:
        """Add the turn that was executed at this state."""
        head = kept(self._messages, request.messages)
        changed = request.tools != self._tools
        if action.logprobs is not None:
            action = action.model_copy(update={"logprobs": None})  # this turn's label holds them: once is enough
        turn = Turn(
            index=len(self.turns),
            actor=decision.actor,
            beta=decision.beta,
            coin=decision.coin,
            kept=head,
            messages=request.messages[head:],
            tools=request.tools if changed else None,
            action=action,
        )
        self._messages, self._tools = request.messages, request.tools
        self.turns.append(turn)

    def labelled(self) -> tuple[Turn, ...]:
        """Return all turns, each with the result of its label."""
        return tuple(
            turn.model_copy(update={"label": label.completion, "label_flaw": label.flaw})
            if (label := self.labels.get(turn.index))
            else turn
            for turn in self.turns
        )
