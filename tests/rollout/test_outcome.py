"""How a rollout ended follows from its scaffold and its recording, and from nothing else."""

import pytest

from dagger_operator.api import Role
from dagger_operator.policy.session import Recording, Silence
from dagger_operator.rollout.outcome import InfrastructureFailed, Verdict, patch_of, verdict
from dagger_operator.rollout.scaffold import ScaffoldEnd
from dagger_operator.store.records import Completion, Failure, LabelFlaw, Outcome, Turn


def turns(count: int, *, lost: int = 0, flaw: LabelFlaw = LabelFlaw.REQUEST_FAILED) -> tuple[Turn, ...]:
    action = Completion(message={"role": "assistant", "content": "x"}, policy="p", finish_reason="stop")
    flaws = [flaw] * lost + [None] * (count - lost)
    return tuple(
        Turn(index=i, actor=Role.STUDENT, beta=0.5, coin=0.7, kept=0, messages=(), action=action, label_flaw=flaw)
        for i, flaw in enumerate(flaws)
    )


def recording(
    visited: tuple[Turn, ...] = turns(3),
    *,
    failure: Failure | None = None,
    policy_error: Failure | None = None,
    limit: bool = False,
    silent: float | None = None,
) -> Recording:
    silence = None if silent is None else Silence(Role.STUDENT, silent)
    return Recording(visited, None, failure, policy_error, limit, 0.0, 0.0, silence)


WHY = Failure(reason="Because", message="it broke")
TOO_LONG = Failure(reason="ContextTooLong", message="it has too many tokens")
SUBMITTED = ScaffoldEnd("Submitted")


@pytest.mark.parametrize(
    ("end", "seen", "expected"),
    [
        (SUBMITTED, recording(), Verdict(None, "Submitted")),
        (ScaffoldEnd("RepeatedFormatError"), recording(), Verdict(Outcome.UNRESOLVED, "RepeatedFormatError")),
        (ScaffoldEnd("ExitCode2"), recording(), Verdict(Outcome.UNRESOLVED, "ExitCode2")),
        (ScaffoldEnd("LimitReached"), recording(limit=True), Verdict(Outcome.LIMIT_REACHED, "LimitReached")),
        (ScaffoldEnd("Deadline"), recording(), Verdict(Outcome.LIMIT_REACHED, "Deadline")),
        # It asked nobody.
        (ScaffoldEnd("Deadline"), recording(()), Verdict(Outcome.LIMIT_REACHED, "Deadline")),
        # The last turn of one that took its time.
        (ScaffoldEnd("Deadline"), recording(silent=50.0), Verdict(Outcome.LIMIT_REACHED, "Deadline")),
        # A program that shrugs the refusal off and ends well has had its turns all the same.
        (SUBMITTED, recording(limit=True), Verdict(Outcome.LIMIT_REACHED, "LimitReached")),
        (ScaffoldEnd("GatewayRefused"), recording(policy_error=WHY), Verdict(Outcome.POLICY_ERROR, "Because")),
        (SUBMITTED, recording(policy_error=WHY), Verdict(Outcome.POLICY_ERROR, "Because")),
    ],
)
def test_an_agents_end_is_judged(end: ScaffoldEnd, seen: Recording, expected: Verdict) -> None:
    assert verdict(end, seen, min_coverage=0.95, timeout=100) == expected


@pytest.mark.parametrize(
    ("end", "seen", "reason"),
    [
        (SUBMITTED, recording(failure=WHY), "Because"),
        (SUBMITTED, recording(failure=WHY, policy_error=WHY, limit=True), "Because"),
        (ScaffoldEnd("ExitCode127", "not found"), recording(()), "ScaffoldNeverActed"),
        # Whatever exceeded the sandbox's limits, it was no policy.
        (ScaffoldEnd("LimitReached", "Evicted: its disk is full"), recording(()), "ScaffoldNeverActed"),
        (SUBMITTED, recording(turns(10, lost=1)), "LabelsUnavailable"),
        (ScaffoldEnd("Deadline"), recording((), silent=1.0), "PolicySilent"),
        (ScaffoldEnd("Deadline"), recording(silent=51.0), "PolicySilent"),
        (ScaffoldEnd("ExitCode1", "timed out"), recording(silent=51.0), "PolicySilent"),
    ],
)
def test_what_infrastructure_broke_is_judged_by_nobody(end: ScaffoldEnd, seen: Recording, reason: str) -> None:
    with pytest.raises(InfrastructureFailed) as caught:
        verdict(end, seen, min_coverage=0.95, timeout=100)
    assert caught.value.failure.reason == reason


def test_a_prompt_that_is_too_long_is_the_policys_own_end_even_before_its_first_turn() -> None:
    found = verdict(ScaffoldEnd("GatewayRefused"), recording((), policy_error=TOO_LONG), min_coverage=0.95, timeout=100)
    assert found == Verdict(Outcome.POLICY_ERROR, "ContextTooLong")


def test_a_first_request_that_never_fitted_the_policy_is_nobodys_zero() -> None:
    with pytest.raises(InfrastructureFailed, match="Because"):
        verdict(ScaffoldEnd("GatewayRefused"), recording((), policy_error=WHY), min_coverage=0.95, timeout=100)


def test_a_few_lost_labels_are_a_matter_of_coverage_only() -> None:
    assert verdict(SUBMITTED, recording(turns(10, lost=1)), min_coverage=0.9, timeout=100).outcome is None


@pytest.mark.parametrize("flaw", [flaw for flaw in LabelFlaw if flaw is not LabelFlaw.REQUEST_FAILED])
def test_labels_that_the_teacher_could_not_give_break_no_rollout(flaw: LabelFlaw) -> None:
    assert verdict(SUBMITTED, recording(turns(10, lost=10, flaw=flaw)), min_coverage=0.95, timeout=100).outcome is None


def test_the_agents_own_patch_is_graded_where_it_gave_one() -> None:
    assert patch_of(ScaffoldEnd("Submitted", "diff --git a/x b/x\n"), "all") == "diff --git a/x b/x\n"
    assert patch_of(ScaffoldEnd("Submitted", "\n--- a/x\n"), "all") == "--- a/x\n"
    assert patch_of(ScaffoldEnd("Submitted", "done"), "all") == "all"
    assert patch_of(ScaffoldEnd("Submitted"), "all") == "all"
