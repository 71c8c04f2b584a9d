"""The two ways in which a policy can fail to act, and what each means for a rollout.

PolicyFailure
  PolicyUnavailable  infrastructure: the rollout is retried on the infrastructure budget, and is never training data
  PolicyRefused      the policy's own: it cannot continue from this state; if the state is too long, the agent may shorten it and continue
"""

from typing import Self

from dagger_operator.store.records import Failure

CONTEXT_TOO_LONG = "ContextTooLong"
"""Reason of a refusal: the state has more tokens than the policy takes."""


class PolicyFailure(Exception):
    """A request to a policy that got no answer. `reason` is CamelCase from a bounded set."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")

    @property
    def record(self) -> Failure:
        return Failure(reason=self.reason, message=self.message)

    def anew(self) -> Self:
        """Return the same failure without its traceback, whose frames would keep the request alive."""
        return type(self)(self.reason, self.message)


class PolicyUnavailable(PolicyFailure):
    """Unreachable, 5xx, 429 beyond the retry budget, unpaid, garbled, or a policy version other than the requested one."""


class PolicyRefused(PolicyFailure):
    """The policy understood the request and cannot serve it; asking again would not help."""
