"""The two ways in which a policy cannot act, and what each means for a rollout.

PolicyFailure
  PolicyUnavailable  infrastructure: the rollout is retried on the infrastructure budget, and is never training data
  PolicyRefused      the policy's own: it cannot go on from this state; where that is too long for it, the agent may shorten it and go on
"""

from typing import Self

from dagger_operator.store.records import Failure

CONTEXT_TOO_LONG = "ContextTooLong"
"""Reason of a refusal: the state has more tokens than the policy takes."""


class PolicyFailure(Exception):
    """A request to a policy that stays without an answer. `reason` is CamelCase from a bounded set."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")

    @property
    def record(self) -> Failure:
        return Failure(reason=self.reason, message=self.message)

    def anew(self) -> Self:
        """The same failure without a traceback, whose frames keep the request alive."""
        return type(self)(self.reason, self.message)


class PolicyUnavailable(PolicyFailure):
    """Unreachable, 5xx, 429 beyond the budget, unpaid, garbled, or another policy version than was asked for."""


class PolicyRefused(PolicyFailure):
    """The policy understood the request and cannot serve it; asking again would not help."""
