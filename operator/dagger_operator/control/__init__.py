"""The round state machine as a pure function: what should exist, given what is observed.

A runtime reads objects, pods and results, makes `Observed` of them (`children`, `Results`), asks `plan`, applies what it says
and writes its status. It decides nothing.
"""

from dagger_operator.control.conditions import ConditionType, Event, Reason
from dagger_operator.control.names import ATTEMPT, COMPONENT, FAILED, MANAGED_BY, MANAGER, RETRY, ROUND, RUN, Ref, Role
from dagger_operator.control.observe import Child, ChildState, Observed, Trouble, child, children
from dagger_operator.control.plan import Plan, plan
from dagger_operator.control.results import Results, read_results
from dagger_operator.control.rounds import StageName, Step, next_step, steps
from dagger_operator.control.status import refused

__all__ = [
    "ATTEMPT",
    "COMPONENT",
    "FAILED",
    "MANAGED_BY",
    "MANAGER",
    "RETRY",
    "ROUND",
    "RUN",
    "Child",
    "ChildState",
    "ConditionType",
    "Event",
    "Observed",
    "Plan",
    "Reason",
    "Ref",
    "Results",
    "Role",
    "StageName",
    "Step",
    "Trouble",
    "child",
    "children",
    "next_step",
    "plan",
    "read_results",
    "refused",
    "steps",
]
