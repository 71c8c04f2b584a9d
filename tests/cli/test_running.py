"""What `daggerctl run` says before it begins."""

from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Phase, RunStatus, load
from dagger_operator.cli import running
from dagger_operator.control.names import RETRY
from dagger_operator.local.folder import RunFolder
from dagger_operator.sandbox.isolation import probe


def test_how_commands_of_models_are_held_here_is_said_in_one_line(ctl: Any, document: dict[str, Any]) -> None:
    document["spec"]["suspend"] = True
    answer = ctl("run", "run.yaml", documents=[document])
    assert answer.returncode == 0, answer.stderr
    assert probe().describe() in answer.stdout.splitlines()


def test_nothing_is_said_of_this_machine_where_sandboxes_are_pods(ctl: Any, document: dict[str, Any]) -> None:
    document["spec"] |= {"suspend": True, "sandbox": {"backend": "Pod"}}
    answer = ctl("run", "run.yaml", documents=[document])
    assert answer.returncode == 0 and "Process sandboxes" not in answer.stdout


@pytest.mark.parametrize("written", [None, "1", "after the disk was cleared", "", "-3", "1.5"])
def test_a_failed_run_gets_a_new_attempt_whatever_stands_in_its_annotation(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None
) -> None:
    if written is not None:
        document["metadata"]["annotations"] = {RETRY: written}
    failed = load(document).model_copy(update={"status": RunStatus(phase=Phase.FAILED)})
    RunFolder(tmp_path, "small").save(failed)
    taken_up: list[Any] = []
    monkeypatch.setenv("DAGGER_HOME", str(tmp_path))
    monkeypatch.setattr(running, "_supervise", lambda folder, run: taken_up.append(run) or 0)
    assert running.resume("small") == 0
    (run,) = taken_up
    assert run.metadata.annotations[RETRY] not in ("", written)
