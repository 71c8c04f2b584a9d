"""The experiment's arms differ only in what is compared, and its report says what came out."""

from typing import Any

import experiment
from dagger_operator.api import EvaluationSummary, RolloutSummary, TrainingSummary, load
from dagger_operator.store.results import EvaluationResult, RolloutResult, TrainingResult
from experiment import Arm, Pair, manifest, report
from run import MANIFEST


def test_the_arms_are_valid_and_differ_in_mixing_and_number_of_tasks_alone() -> None:
    arms: list[dict[str, Any]] = [
        load(manifest(MANIFEST, 3, arm, later_tasks=n)).spec.wire() for arm, n in (("dagger", None), ("cloning", 100))
    ]
    differing = {key for key in arms[0] if arms[0][key] != arms[1][key]}
    assert differing == {"mixing", "tasks", "storage"}
    assert arms[1]["mixing"]["beta"] == {"type": "Constant", "value": 1.0}
    assert {key for key in arms[0]["tasks"] if arms[0]["tasks"][key] != arms[1]["tasks"][key]} == {"perRound"}
    assert arms[0]["tasks"]["firstRound"] * experiment.TEACHER_TURNS > 0 and arms[1]["tasks"]["perRound"] == 100


def arm(resolved: int, false_submits: int, labels: int) -> Arm:
    tasks = [f"heldout-{n}" for n in range(100)]
    evaluation = EvaluationSummary(
        policy="p",
        tasks=100,
        resolved=resolved,
        resolved_rate=resolved / 100,
        interval=[0.0, 1.0],
        false_submits=false_submits,
        seconds=1.0,
    )
    rollout = RolloutSummary(
        rollouts=1,
        turns=1,
        labels=labels,
        label_coverage=1.0,
        teacher_turn_share=1.0,
        teacher_token_share=1.0,
        data_digest="d",
        seconds=1.0,
    )
    training = TrainingSummary(steps=9, labels=labels, tokens=1, checkpoint="p", seconds=1.0)
    return Arm(
        (RolloutResult(summary=rollout, manifest_digest="d", excluded={}),),
        (TrainingResult(summary=training, policy="p"),),
        (EvaluationResult(summary=evaluation, resolved_tasks=tuple(tasks[:resolved]), unresolved_tasks=tuple(tasks[resolved:])),),
    )


def test_the_report_lists_every_seed_and_the_interval_over_seeds() -> None:
    text = report([Pair(seed, arm(70 + 2 * seed, 0, 500), arm(60, 20, 501)) for seed in (1, 2, 3)])
    assert all(f"\n| {seed} | 0.{70 + 2 * seed} | 0.60 | +0.{10 + 2 * seed}0 (" in text for seed in (1, 2, 3))
    # Differences 0.12, 0.14, 0.16: mean 0.14, standard error 0.02 / sqrt(3), times 4.303 for two degrees of freedom.
    assert "**+0.140** (95 % interval +0.090 to +0.190" in text
    assert "DAgger resolved 222 of 300" in text and "cloning 180 of 300" in text
    assert "0.000 / 0.200 | 500 / 501 | 9 / 9 |" in text


def test_the_report_does_not_hide_a_loss() -> None:
    text = report([Pair(seed, arm(50, 0, 500), arm(60, 20, 500)) for seed in (1, 2)])
    assert "Mean difference over 2 seeds: **-0.100**" in text
