"""Which failures of a stage's pods are retried, and on which budget: `spec.failurePolicy` as decisions.

The Job controller decides what it can by exit code and condition. From the first rule with reasons on, which the controller cannot see, the
plan decides; the Job's own limit is then raised by the retries that infrastructure failures may add.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from dagger_operator.api import DAggerRun, FailureAction, FailureRule, Role, RunStage
from dagger_operator.control.child import Child, PodFailure, Trouble
from dagger_operator.control.rounds import StageName
from dagger_operator.control.servers import served
from dagger_operator.store.stage import ExitCode

Json = dict[str, Any]

RETRIES = 6
"""Retries of each pod of a stage that has no setting of its own."""

_ACTIONS = {
    FailureAction.RETRY: "Count",
    FailureAction.RETRY_WITHOUT_COUNTING: "Ignore",
    FailureAction.FAIL_RUN: "FailJob",
}


NOT_SERVED = {"PolicyNotServed": Role.STUDENT, "StudentNotServed": Role.STUDENT, "TeacherNotServed": Role.TEACHER}
"""Reasons with which a stage ends that waited for servers for their whole `startupDeadlineSeconds`, and for which."""


def own_retries(run: DAggerRun, stage: StageName, pods: int) -> int:
    """Return the retries of a stage's pods that failed by themselves."""
    return run.spec.training.retries if stage is StageName.TRAINING else RETRIES * pods


def of_the_worst(failures: Sequence[PodFailure]) -> Sequence[PodFailure]:
    """Return the failures of the pod, including its replacements, that failed most often."""
    by_pod = Counter(failure.index for failure in failures)
    most = max(by_pod, key=by_pod.__getitem__, default="")
    return [failure for failure in failures if failure.index == most]


def verdict(run: DAggerRun, stage: StageName, failure: PodFailure) -> FailureAction:
    """Return what to do about one pod that failed."""
    for rule in _rules(run, stage):
        if (not rule.reasons or failure.reason in rule.reasons) and (not rule.exit_codes or failure.exit_code in rule.exit_codes):
            return rule.action
    if failure.exit_code == ExitCode.PERMANENT:
        return FailureAction.FAIL_RUN
    if failure.exit_code == ExitCode.UNAVAILABLE or failure.disrupted:
        return FailureAction.RETRY_WITHOUT_COUNTING
    return FailureAction.RETRY


def waited_for_nodes(run: DAggerRun, failure: PodFailure, servers: Mapping[Role, Child | None]) -> bool:
    """Whether a pod failed because servers did not answer, without their pods having had their nodes for all the time that it waited.

    That costs nothing: time without a node is limited by `preRunningDeadlineSeconds` alone, and a server that has its node and does not
    become ready is given up itself. A server that was placed again since makes earlier failures count no more.
    """
    role = NOT_SERVED.get(failure.reason)
    if role is None or role not in servers or (serving := served(run, role)) is None:
        return False
    if (server := servers[role]) is None or server.placed is None:
        return True
    return failure.at is not None and failure.at - timedelta(seconds=serving.startup_deadline_seconds) < server.placed


def given_up(run: DAggerRun, stage: StageName, job: Child, pods: int, servers: Mapping[Role, Child | None] = {}) -> Trouble | None:
    """Return why to give up a Job that still retries: a failure that ends the run, or an exhausted budget. `servers` are those that it
    asks."""
    verdicts = [(verdict(run, stage, failure), failure) for failure in job.failures]
    if fatal := next((failure for action, failure in verdicts if action is FailureAction.FAIL_RUN), None):
        return Trouble(fatal.reason, fatal.message)
    budgets = {
        FailureAction.RETRY_WITHOUT_COUNTING: ("failurePolicy.infrastructureRetries", run.spec.failure_policy.infrastructure_retries),
        FailureAction.RETRY: ("the stage's own retries", own_retries(run, stage, pods)),
    }
    for action, (name, budget) in budgets.items():
        spent: Sequence[PodFailure] = [failure for one, failure in verdicts if one is action]
        by_infrastructure = action is FailureAction.RETRY_WITHOUT_COUNTING
        if by_infrastructure:
            spent = [failure for failure in spent if not waited_for_nodes(run, failure, servers)]
        # An outage ends all workers, and the end of one node of a training ends its peers.
        by_pod = by_infrastructure or stage is StageName.TRAINING
        if by_pod:
            spent = of_the_worst(spent)
        if len(spent) > budget:
            last = spent[-1]
            whose = f"pods of index {last.index}" if by_pod and last.index else "pods"
            return Trouble(last.reason, f"{len(spent)} {whose} failed, {name} allows {budget}; the last one: {last.message}")
    return None


def server_given_up(run: DAggerRun, server: Child) -> Trouble | None:
    """Return why to give up a server that keeps restarting for lack of a service; its budget is the same as that of a stage's pods."""
    budget, failures = run.spec.failure_policy.infrastructure_retries, server.failures
    if len(failures) <= budget:
        return None
    tries = f"{len(failures)} starts failed, failurePolicy.infrastructureRetries allows {budget}"
    return Trouble(failures[-1].reason, f"{tries}; the last one: {failures[-1].message}")


def retry_settings(run: DAggerRun, stage: StageName, pods: int) -> Json:
    """Return `backoffLimit` and `podFailurePolicy` of a stage's Job."""
    rules = _rules(run, stage)
    by_code = rules[: next((index for index, rule in enumerate(rules) if rule.reasons), len(rules))]
    decided = [_on_exit_codes(_ACTIONS[rule.action], *rule.exit_codes) for rule in by_code]
    limit = own_retries(run, stage, pods)
    if len(by_code) < len(rules):
        limit += run.spec.failure_policy.infrastructure_retries * (1 if stage is StageName.TRAINING else pods)
    else:
        decided.append(_on_exit_codes("FailJob", ExitCode.PERMANENT))
        decided.append(_on_exit_codes("Ignore", ExitCode.UNAVAILABLE))
        decided.append({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    if stage is StageName.TRAINING:
        limit *= pods  # the controller counts pods; the plan stops the Job once one of its nodes has failed too often
    return {"backoffLimit": limit, **({"podFailurePolicy": {"rules": decided}} if decided else {})}


def _rules(run: DAggerRun, stage: StageName) -> list[FailureRule]:
    return [rule for rule in run.spec.failure_policy.rules if not rule.stages or RunStage(stage.capitalize()) in rule.stages]


def _on_exit_codes(action: str, *codes: int) -> Json:
    return {"action": action, "onExitCodes": {"containerName": "stage", "operator": "In", "values": sorted({int(code) for code in codes})}}
