"""The quickstart itself, as `make quickstart` runs it: real vLLM, real DeepSpeed, process sandboxes, and a better student at the end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dagger_operator.api import Phase
from dagger_operator.local.folder import RunFolder


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_in_three_rounds_the_student_gets_clearly_better_and_stops_submitting_wrong_work(
    quickstart: Path, tmp_path: Path, free_port: int
) -> None:
    environ = {key: value for key, value in os.environ.items() if key != "DAGGER_HOME"}
    # No pipe: a process that outlived the run would hold it open.
    with (tmp_path / "output").open("w+") as output:
        command = [sys.executable, quickstart / "run.py", "--port", str(free_port)]
        ended = subprocess.run(command, cwd=tmp_path, env=environ, stdout=output, stderr=subprocess.STDOUT)
        output.seek(0)
        said = output.read()
    assert ended.returncode == 0, said[-5000:]
    run = RunFolder(tmp_path / ".dagger", "quickstart").require()
    assert run.status is not None and run.status.phase is Phase.SUCCEEDED
    evaluations = [entry.evaluation for entry in run.status.rounds]
    mixes = [entry.rollout.teacher_turn_share for entry in run.status.rounds if entry.rollout]
    first, last = evaluations[0], evaluations[-1]
    assert first is not None and last is not None and len(evaluations) == 3
    print(json.dumps([e.wire() for e in evaluations if e]))
    assert last.resolved_rate > first.resolved_rate + 0.15
    assert last.false_submits <= 0.05 * last.tasks < first.false_submits
    assert mixes[0] == 1.0 and abs(mixes[1] - 0.3) < 0.1 and mixes[2] == 0.0
