"""The status: what people read, derived from decisions and results; bounded in size, written in one place."""

from collections.abc import Sequence
from datetime import datetime

from dagger_operator.api import Condition, DAggerRun, Phase, Problem, Role, RoundStatus, RunStatus
from dagger_operator.control.child import Trouble
from dagger_operator.control.conditions import ConditionType, Reason, condition, settle
from dagger_operator.control.gates import Servers, servers_trouble
from dagger_operator.control.observe import Observed
from dagger_operator.control.progress import gpu_hours, run_end, shown
from dagger_operator.control.refusals import since
from dagger_operator.control.results import Results
from dagger_operator.control.rounds import Work
from dagger_operator.control.servers import served
from dagger_operator.control.situation import Situation
from dagger_operator.store.results import EvaluationResult, RolloutResult, TrainingResult

ROUNDS_SHOWN = 100


def report(run: DAggerRun, observed: Observed, work: Work | None, situation: Situation, servers: Servers) -> RunStatus:
    """Return the whole status."""
    previous = run.status or RunStatus()
    rounds = _rounds(observed.results)
    resolved = next((one.evaluation.resolved_rate for one in reversed(rounds) if one.evaluation), None)
    share = next((one.rollout.teacher_turn_share for one in reversed(rounds) if one.rollout), None)
    still_ended = situation.ended and previous.phase is situation.phase
    moving = None if situation.ended or situation.phase is Phase.SUSPENDED else work
    progress = shown(observed.progress, moving, previous.progress, observed.now)
    # If progress is unchanged, nothing that follows from it is rewritten either.
    unchanged = (progress, situation.phase, situation.round) == (previous.progress, previous.phase, previous.round)
    end = previous.estimated_completion_time if unchanged else run_end(run, observed.results, moving, observed.progress, observed.now)
    hours = previous.gpu_hours if unchanged else f"{gpu_hours(run, observed.progress, observed.results):.1f}"
    return RunStatus(
        observed_generation=run.metadata.generation,
        phase=situation.phase,
        round=situation.round,
        reason=situation.reason,
        conditions=settle(_conditions(run, situation, servers), previous.conditions, run.metadata.generation, observed.now),
        rounds=rounds[-ROUNDS_SHOWN:],
        resolved=_percent(resolved),
        teacher_share=_percent(share),
        progress=progress,
        gpu_hours=hours,
        start_time=previous.start_time or observed.now,
        estimated_completion_time=end,
        completion_time=(previous.completion_time if still_ended else None) or (observed.now if situation.ended else None),
    )


def succeeded(run: DAggerRun, situation: Situation, now: datetime) -> RunStatus:
    """Return the status of a run whose success was reported: it stays, whatever storage contains by now."""
    previous = run.status or RunStatus()
    update = {
        "observed_generation": run.metadata.generation,
        "reason": situation.reason,
        "conditions": settle(_conditions(run, situation, {}), previous.conditions, run.metadata.generation, now),
        "completion_time": previous.completion_time or now,
    }
    return previous.model_copy(update=update)


def refused(generation: int | None, status: RunStatus | None, problems: Sequence[Problem], now: datetime) -> RunStatus:
    """Return the status of a resource that cannot be run, or had a forbidden edit: it stops where it was."""
    message = "\n".join(map(str, problems))
    ended = status is not None and status.phase in (Phase.SUCCEEDED, Phase.FAILED)
    untrue = (ConditionType.ACCEPTED,) if ended else (ConditionType.ACCEPTED, ConditionType.PROGRESSING)
    fresh = [condition(kind, False, Reason.INVALID_SPEC, message) for kind in untrue]
    return _overlaid(generation, status, now, Reason.INVALID_SPEC, fresh)


def blind(run: DAggerRun, problem: str, now: datetime, late: Trouble | None) -> RunStatus:
    """Return the status while results cannot be read: what was known before, and why nothing newer is. A run that is late still fails."""
    previous = run.status or RunStatus()
    if late is not None and (previous.phase is not Phase.FAILED or previous.reason == late.reason):
        ended = {"phase": Phase.FAILED, "reason": late.reason, "completion_time": previous.completion_time or now}
        failed = [
            condition(ConditionType.ACCEPTED, True, Reason.VALID),
            condition(ConditionType.PROGRESSING, False, late.reason, late.message),
            condition(ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED),
            condition(ConditionType.FAILED, True, late.reason, late.message),
        ]
        return _overlaid(run.metadata.generation, run.status, now, Reason.STORAGE_UNAVAILABLE, failed).model_copy(update=ended)
    fresh = [
        condition(ConditionType.ACCEPTED, True, Reason.VALID),
        condition(ConditionType.PROGRESSING, False, Reason.STORAGE_UNAVAILABLE, problem),
    ]
    if run.spec.suspend:
        fresh.append(condition(ConditionType.SUSPENDED, True, Reason.SUSPENDED))
    return _overlaid(run.metadata.generation, run.status, now, Reason.STORAGE_UNAVAILABLE, fresh)


def _overlaid(generation: int | None, status: RunStatus | None, now: datetime, reason: Reason, fresh: list[Condition]) -> RunStatus:
    previous = status or RunStatus()
    kept = [one for one in previous.conditions if one.type not in {new.type for new in fresh}]
    update = {
        "observed_generation": generation,
        "reason": reason.value,
        "conditions": settle([*fresh, *kept], previous.conditions, generation, now),
        "start_time": previous.start_time or now,
    }
    return previous.model_copy(update=update)


def _conditions(run: DAggerRun, situation: Situation, servers: Servers) -> list[Condition]:
    reason, message = situation.reason, situation.message

    def end(kind: ConditionType, phase: Phase, otherwise: Reason) -> Condition:
        holds = situation.phase is phase
        return condition(kind, holds, reason if holds else otherwise, message if holds else "")

    conditions = [
        condition(ConditionType.ACCEPTED, True, Reason.VALID),
        condition(ConditionType.PROGRESSING, situation.progressing, reason, message),
        end(ConditionType.SUSPENDED, Phase.SUSPENDED, Reason.NOT_SUSPENDED),
        end(ConditionType.SUCCEEDED, Phase.SUCCEEDED, Reason.ROUNDS_LEFT),
        end(ConditionType.FAILED, Phase.FAILED, Reason.NOT_FAILED),
    ]
    if any(served(run, role) for role in Role):
        conditions.insert(2, _servers_ready(servers))
    return conditions


def _servers_ready(servers: Servers) -> Condition:
    if not servers:
        return condition(ConditionType.SERVERS_READY, False, Reason.SERVERS_RELEASED, "no stage asks them at this moment")
    if (trouble := servers_trouble(servers)) is not None:
        return condition(ConditionType.SERVERS_READY, False, trouble.reason, since(trouble))
    return condition(ConditionType.SERVERS_READY, True, Reason.SERVERS_READY, ", ".join(servers))


def _rounds(results: Results) -> list[RoundStatus]:
    """Return the rounds, from round 0 if the initial student was evaluated: nothing else of that round is shown."""
    rounds = []
    for number in range(0 if results.has(0, "evaluation") else 1, results.newest_round + 1):
        rollout, training = results.get(RolloutResult, number), results.get(TrainingResult, number)
        evaluation = results.get(EvaluationResult, number)
        rounds.append(
            RoundStatus(
                round=number,
                policy=results.student_after(number - 1),
                rollout=rollout.summary if rollout else None,
                training=training.summary if training else None,
                evaluation=evaluation.summary if evaluation else None,
            )
        )
    return rounds


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}%"
