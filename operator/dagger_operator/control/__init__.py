"""The round state machine as a pure function: what should exist, given what is observed.

A runtime reads objects, pods and results, builds `Observed` from them (`children`, `Results`), calls `plan`, applies the plan and writes
its status. The runtime itself decides nothing.
"""

from dagger_operator.control.child import Child, ChildState, PodFailure, Trouble
from dagger_operator.control.conditions import ConditionType, Event, Reason
from dagger_operator.control.names import ATTEMPT, COMPONENT, FAILED, MANAGED_BY, MANAGED_BY_VALUE, RETRY, ROUND, RUN, Ref
from dagger_operator.control.network import PROMETHEUS, Peer
from dagger_operator.control.observe import Observed, child, children
from dagger_operator.control.plan import Plan, news, plan
from dagger_operator.control.progress import Progress, read_progress
from dagger_operator.control.results import Results, read_results
from dagger_operator.control.rounds import StageName, Step, Work, next_steps, steps
from dagger_operator.control.status import refused

__all__ = [
    "ATTEMPT",
    "COMPONENT",
    "FAILED",
    "MANAGED_BY",
    "MANAGED_BY_VALUE",
    "PROMETHEUS",
    "RETRY",
    "ROUND",
    "RUN",
    "Child",
    "ChildState",
    "ConditionType",
    "Event",
    "Observed",
    "Peer",
    "Plan",
    "PodFailure",
    "Progress",
    "Reason",
    "Ref",
    "Results",
    "StageName",
    "Step",
    "Trouble",
    "Work",
    "child",
    "children",
    "news",
    "next_steps",
    "plan",
    "read_progress",
    "read_results",
    "refused",
    "steps",
]
