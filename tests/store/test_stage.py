"""A stage command: what it is told, and how it ends. The commands here are real processes."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Storage
from dagger_operator.store.stage import ExitCode, Stage, StageFailure

Settings = tuple[Storage, dict[str, str]]
pytestmark = pytest.mark.parametrize("settings", ["folder"], indirect=True)


@pytest.fixture
def environ(document: dict[str, Any], tmp_path: Path) -> dict[str, str]:
    return {"DAGGER_RUN": json.dumps(document), "DAGGER_TERMINATION_LOG": str(tmp_path / "end"), "PATH": os.environ["PATH"]}


async def start(body: str, environ: dict[str, str]) -> asyncio.subprocess.Process:
    code = f"""
import asyncio, sys
from dagger_operator.store.objects import DamagedObject, StoreUnavailable
from dagger_operator.store.stage import StageFailure, main
async def body(stage):
    {body}
sys.exit(main("rollout", body))
"""
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=environ, stdout=asyncio.subprocess.PIPE)


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("pass", ExitCode.DONE, None),
        ("raise StageFailure('TeacherDown', 'start it', permanent=False)", ExitCode.UNAVAILABLE, "TeacherDown"),
        ("raise StageFailure('BadTasks', 'mend them')", ExitCode.PERMANENT, "BadTasks"),
        ("raise StoreUnavailable('no answer')", ExitCode.UNAVAILABLE, "StorageUnavailable"),
        ("raise DamagedObject('a/b.parquet', 'is cut short')", ExitCode.PERMANENT, "DamagedObject"),
        ("raise ValueError('a bug')", ExitCode.ERROR, "Unexpected"),
    ],
)
async def test_how_it_ends_is_in_its_exit_code_and_its_last_words(
    environ: dict[str, str], tmp_path: Path, body: str, code: ExitCode, reason: str | None
) -> None:
    process = await start(body, environ)
    output, _ = await process.communicate()
    assert process.returncode == code, output
    if reason is None:
        assert not (tmp_path / "end").exists()
    else:
        assert json.loads((tmp_path / "end").read_text())["reason"] == reason
        assert json.loads(output.splitlines()[-1])["reason"] == reason


async def test_when_asked_to_end_it_cleans_up_and_can_be_started_again(environ: dict[str, str], tmp_path: Path) -> None:
    process = await start(
        f"""
    try:
        print("up", flush=True)
        await asyncio.sleep(600)
    finally:
        open({str(tmp_path / "cleaned")!r}, "w").close()
""",
        environ,
    )
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == ExitCode.UNAVAILABLE
    assert (tmp_path / "cleaned").exists() and json.loads((tmp_path / "end").read_text())["reason"] == "Terminated"


def test_it_is_told_everything_by_its_environment(environ: dict[str, str], tmp_path: Path) -> None:
    told = {
        "DAGGER_ROUND": "3", "JOB_COMPLETION_INDEX": "2", "DAGGER_POD": "a-run-r003-rollout-abc-2-xyz", "DAGGER_WORKER": "rollout-0002",
        "DAGGER_POLICY": "r002-abc", "DAGGER_SCRATCH": str(tmp_path),
    }  # fmt: skip
    stage = Stage.from_environment({**environ, **told})
    assert (stage.round, stage.index, stage.worker, stage.policy, stage.scratch) == (3, 2, "rollout-0002", "r002-abc", tmp_path)
    assert stage.run.metadata.name == "a-run"


def test_without_a_worker_name_the_pod_is_the_worker(environ: dict[str, str]) -> None:
    assert Stage.from_environment({**environ, "DAGGER_POD": "pod-7"}).worker == "pod-7"


def test_scratch_exists_and_is_its_own(environ: dict[str, str], tmp_path: Path) -> None:
    stage = Stage.from_environment({**environ, "DAGGER_SCRATCH": str(tmp_path / "not" / "yet")})
    assert stage.scratch.is_dir()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"DAGGER_RUN": None}, "NoRun"),
        ({"DAGGER_RUN": "{"}, "InvalidRun"),
        ({"DAGGER_RUN": "{}"}, "InvalidRun"),
        ({"DAGGER_ROUND": "x"}, "BadEnvironment"),
    ],
)
def test_a_wrong_environment_is_said_in_words(environ: dict[str, str], change: dict[str, str | None], reason: str) -> None:
    told = {key: value for key, value in {**environ, **change}.items() if value is not None}
    with pytest.raises(StageFailure) as failed:
        Stage.from_environment(told)
    assert failed.value.reason == reason
