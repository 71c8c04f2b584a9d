"""Two evaluated rounds are compared task by task, the first less the second."""

import asyncio
from pathlib import Path
from typing import Any

from dagger_operator.api import EvaluationSummary, load
from dagger_operator.local.acceptance import accept
from dagger_operator.local.folder import RunFolder
from dagger_operator.store import layout
from dagger_operator.store.objects import Store
from dagger_operator.store.results import EvaluationResult, save_result

TASKS = [f"task-{number:02d}" for number in range(20)]


def _evaluation(resolved: int) -> EvaluationResult:
    summary = EvaluationSummary(
        policy="p", tasks=20, resolved=resolved, resolved_rate=resolved / 20, interval=[0.0, 1.0], false_submits=0, seconds=1.0
    )
    return EvaluationResult(summary=summary, resolved_tasks=tuple(TASKS[:resolved]), unresolved_tasks=tuple(TASKS[resolved:]))


def _finished_run(folder: Path, document: dict[str, Any]) -> None:
    run = accept(load(document), None, folder)
    RunFolder(folder / ".dagger", "small").save(run)
    store = Store.open(run.spec.storage)
    for number, resolved in ((0, 2), (1, 5), (2, 15)):
        asyncio.run(save_result(store, number, _evaluation(resolved)))


def test_a_better_round_is_ahead_by_its_points(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    _finished_run(tmp_path, document)
    said = ctl("compare", "small", "2", "1").stdout
    assert "small round 2: 75.0% resolved" in said and "small round 1: 25.0% resolved" in said
    assert "difference on 20 common tasks: +50.0 points, 95% interval +30.0 to +70.0" in said
    assert "by the first alone: 10, by the second alone: 0" in said and "p = 0.002" in said


def test_the_trained_student_is_compared_with_the_one_that_the_run_began_with(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    _finished_run(tmp_path, document)
    said = ctl("compare", "small", "2", "0").stdout
    assert "small round 0: 10.0% resolved" in said and "difference on 20 common tasks: +65.0 points" in said


def test_runs_of_other_places_are_compared_from_files(
    ctl: Any, document: dict[str, Any], from_kubectl: dict[str, Any], tmp_path: Path
) -> None:
    _finished_run(tmp_path, document)
    (tmp_path / ".dagger" / "runs" / "small" / "run.json").unlink()
    assert "+50.0 points" in ctl("compare", "-", "2", "1", piped=[from_kubectl]).stdout
    assert (
        "small round 1: 25.0% resolved"
        in ctl("compare", "-", "2", "1", "--other", "run.yaml", documents=[document], piped=[document]).stdout
    )
    answer = ctl("compare", "-", "3", "1", piped=[from_kubectl])
    assert answer.returncode == 2 and "round 3 of run 'small' has no evaluation" in answer.stderr


def test_a_round_without_evaluation_is_named(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    _finished_run(tmp_path, document)
    answer = ctl("compare", "small", "3", "1")
    assert answer.returncode == 2 and "round 3 of run 'small' has no evaluation" in answer.stderr


def test_evaluations_without_a_common_task_are_not_compared(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    _finished_run(tmp_path, document)
    store = Store.open(accept(load(document), None, tmp_path).spec.storage)
    others = _evaluation(5).model_copy(update={"resolved_tasks": ("other",), "unresolved_tasks": ()})
    asyncio.run(save_result(store, 3, others))
    answer = ctl("compare", "small", "3", "1")
    assert answer.returncode == 2
    assert "round 3 of run 'small' and round 1 of run 'small' have no graded task in common" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_result_that_is_damaged_is_named_with_its_remedy(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    _finished_run(tmp_path, document)
    store = Store.open(accept(load(document), None, tmp_path).spec.storage)
    key = layout.result(2, "evaluation")
    asyncio.run(store.put(key, b"{}"))
    answer = ctl("compare", "small", "2", "1")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: {key}: is no EvaluationResult") and "delete it and start the stage again" in answer.stderr


def test_the_interval_is_named_by_the_confidence_that_was_asked_for(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    document["spec"]["evaluation"] = {"confidence": 0.999}
    _finished_run(tmp_path, document)
    assert "points, 99.9% interval" in ctl("compare", "small", "2", "1").stdout
