"""A stage that is asked to end before it works: as the first process of its container, as in a pod."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dagger_operator.store import ending
from dagger_operator.store.stage import ExitCode
from fixtures.first_process import FIRST, importing

MODULES = [
    "evaluation", "rollout", "training", "training.rank",
    "serving.agent", "serving.preflight", "serving.prepare", "serving.publish", "serving.weights",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_a_stage_that_still_imports_ends_when_it_is_asked_to_and_says_so(tmp_path: Path, module: str) -> None:
    environ = {**os.environ, "PYTHONPATH": importing(tmp_path), "DAGGER_TERMINATION_LOG": str(tmp_path / "end")}
    process = subprocess.Popen([*FIRST, sys.executable, "-m", f"dagger_operator.{module}"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        (stage,) = psutil.Process(process.pid).children()
        stage.terminate()
        assert process.wait(10) == ExitCode.UNAVAILABLE
        assert json.loads((tmp_path / "end").read_text())["reason"] == "Terminated"
    finally:
        process.kill()
        process.communicate()


def test_its_exit_code_is_that_of_a_stage_that_is_asked_to_end_later() -> None:
    assert ending.TERMINATED == ExitCode.UNAVAILABLE
