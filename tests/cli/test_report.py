"""What people see of a run."""

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from dagger_operator.api import DAggerRun, RoundStatus, load
from dagger_operator.cli.live import line, merged
from dagger_operator.cli.report import report
from dagger_operator.store.results import StageProgress


def _run(document: dict[str, Any], **status: Any) -> DAggerRun:
    rollout = {
        "rollouts": 60,
        "outcomes": {"Resolved": 30, "Unresolved": 30},
        "turns": 500,
        "labels": 480,
        "labelCoverage": 0.96,
        "nominalBeta": 0.3,
        "teacherTurnShare": 0.25,
        "teacherTokenShare": 0.125,
        "agreement": 0.5,
        "dataDigest": "d" * 64,
        "seconds": 36.0,
    }
    training = {"steps": 200, "labels": 480, "tokens": 9000, "firstLoss": 0.5, "lastLoss": 0.1, "checkpoint": "r001-x", "seconds": 20.0}
    evaluation = {
        "policy": "r001-x",
        "tasks": 100,
        "resolved": 40,
        "resolvedRate": 0.4,
        "interval": [0.309, 0.498],
        "falseSubmits": 5,
        "seconds": 30.0,
    }
    rounds = [{"round": 1, "rollout": rollout, "training": training, "evaluation": evaluation}, {"round": 2}]
    waits = {"type": "Progressing", "status": "False", "reason": "ImagePullBackOff", "message": "pod x-0: no such image"}
    waits |= {"lastTransitionTime": datetime(2026, 1, 1, tzinfo=UTC).isoformat()}
    whole = {"phase": "Rollout", "round": 2, "reason": "ImagePullBackOff", "rounds": rounds, "conditions": [waits], **status}
    return load({**document, "status": whole})


def _shown(run: DAggerRun) -> str:
    capture = Console(width=100)
    with capture.capture() as text:
        capture.print(report(run))
    return text.get()


def test_the_table_answers_every_question_about_a_round(document: dict[str, Any]) -> None:
    rows = {
        cells[0].strip(): cells[1].strip() for line in _shown(_run(document)).splitlines() if len(cells := line.strip("│ ").split("│")) > 1
    }
    assert rows == {
        "resolved, held out": "40.0 % of 100",
        "interval": "30.9 to 49.8 %",
        "false submits": "5.0 %",
        "nominal beta": "0.30",
        "teacher's turns": "25.0 %",
        "teacher's tokens": "12.5 %",
        "agreement": "50.0 %",
        "labels": "480",
        "label coverage": "96.0 %",
        "training loss": "0.500 -> 0.100",
        "rollouts per hour": "6,000",
        "rollout": "36 s",
        "training": "20 s",
        "evaluation": "30 s",
    }


def test_the_initial_student_has_a_column_of_its_own_with_its_evaluation_alone(document: dict[str, Any]) -> None:
    run = _run(document)
    assert run.status is not None
    evaluated = run.status.rounds[0].evaluation
    run.status.rounds.insert(0, RoundStatus(round=0, policy="r000-x", evaluation=evaluated))
    table = [[cell.strip() for cell in re.split("[│┃]", line)] for line in _shown(run).splitlines() if line[:1] in ("│", "┃")]
    column = {row[1]: row[2] for row in table if row[1]}
    assert column["round"] == "0"
    told = {title: cell for title, cell in column.items() if cell != "-"}
    assert told == {
        "round": "0",
        "resolved, held out": "40.0 % of 100",
        "interval": "30.9 to 49.8 %",
        "false submits": "5.0 %",
        "evaluation": "30 s",
    }


def test_a_waiting_run_says_why(document: dict[str, Any]) -> None:
    shown = _shown(_run(document))
    assert "small: Rollout, round 2 of 5 (ImagePullBackOff)" in shown
    assert "pod x-0: no such image" in shown


def test_progress_of_a_stage_adds_up_what_its_workers_did(document: dict[str, Any]) -> None:
    first = StageProgress(done=7, total=16, unit="rollouts", counters={"turns": 10, "Resolved": 3})
    second = StageProgress(done=8, total=16, unit="rollouts", counters={"turns": 12})
    progress = merged({0: first, 1: second})
    assert progress is not None
    assert (progress.done, progress.total, progress.counters) == (8, 16, {"turns": 22, "Resolved": 3})
    assert line(_run(document), progress).endswith("8/16 rollouts, turns 22, Resolved 3")
    assert merged({}) is None


@pytest.mark.parametrize(("confidence", "said"), [(0.95, "95%"), (0.999, "99.9%"), (0.9999, "99.99%"), (0.57, "57%")])
def test_an_interval_is_as_sure_as_it_was_asked_to_be(document: dict[str, Any], confidence: float, said: str) -> None:
    document["spec"]["evaluation"] = {"confidence": confidence}
    assert f"with its {said} interval" in " ".join(_shown(_run(document)).split())
