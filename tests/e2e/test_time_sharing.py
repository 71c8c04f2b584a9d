"""Serving and training take turns where they share what there is."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.heavy


def _alive(folder: Path, what: str) -> bool:
    """Whether a process whose output goes below the run's logs of a pod named like `what` lives."""
    logs = [path for path in (folder / ".dagger/runs/shared/logs").glob("*") if what in path.name]
    return bool(logs) and any(output.is_relative_to(path) for output in _outputs() for path in logs)


def _outputs() -> Iterator[Path]:
    """Where the output of every process of this machine goes. `Reach` reads environments too, which takes four times as long."""
    for process in Path("/proc").glob("[0-9]*"):
        for descriptor in ("1", "2"):
            with suppress(OSError):  # it has ended
                yield (process / "fd" / descriptor).readlink()


@pytest.mark.timeout(900)
def test_time_shared_servers_are_gone_while_training_runs_and_come_back_with_the_new_student(runs: Any) -> None:
    maker = Path(__file__).parents[2] / "examples/quickstart/student.py"
    subprocess.run([sys.executable, maker, "--seed", "1", "--out", runs.folder / "student"], check=True, stdout=subprocess.DEVNULL)
    file = runs.document(
        "shared",
        rounds=1,
        gpuSharing="TimeShared",
        student={"model": "./student"},
        tasks={"firstRound": 6, "perRound": 6},
        scaffold={"maxTurns": 3},
        training={"steps": {"type": "Constant", "value": 5}, "processesPerNode": 1},
        evaluation={"initial": True},
    )
    process = runs.start("run", str(file))
    trained = False
    while process.poll() is None:
        served, training, still_served = (_alive(runs.folder, what) for what in ("shared-student-", "-training-", "shared-student-"))
        assert not (served and training and still_served), "training and serving held the machine at once"
        trained = trained or training
        time.sleep(0.3)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert trained
    status = json.loads(runs.ctl("status", "shared", "-o", "json"))["status"]
    initial, only = status["rounds"]
    assert only["evaluation"]["policy"] == only["training"]["checkpoint"] != only["policy"]
    assert (initial["round"], initial["evaluation"]["policy"]) == (0, only["policy"])
    compared = runs.ctl("compare", "shared", "1", "0")
    assert "shared round 0: " in compared and "difference on 12 common tasks: " in compared
