"""Stage `prepare`: takes the storage prefix for the run, checks that the store honours conditional writes, and stores the first student."""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import shutil
import sys
import time
from importlib.metadata import version as installed
from pathlib import Path

import structlog

from dagger_operator.serving.models import Hub, check_model, commit, fetch, model_files, source
from dagger_operator.serving.weights import teacher_version
from dagger_operator.store.check import require_honest
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.policies import point_to, save_policy
from dagger_operator.store.progress import Reporter
from dagger_operator.store.results import PrepareResult, read_result, save_result
from dagger_operator.store.stage import Stage, main

log = structlog.get_logger()


async def prepare(stage: Stage) -> None:
    """Run the stage. Raises `StageFailure` if storage or models cannot be used, and says what to change."""
    started = time.monotonic()
    await take_prefix(stage.store, stage.run)
    if await read_result(stage.store, 0, PrepareResult) is not None:
        return
    report = await require_honest(stage.store)
    # The teacher first: a mistake in its name is reported before a large student is copied.
    teacher, revision = await _teacher(stage)
    policy = await _student(stage)
    result = PrepareResult(
        policy=policy,
        teacher=teacher,
        teacher_revision=revision,
        round_trip_seconds=report.round_trip_seconds,
        seconds=time.monotonic() - started,
    )
    await save_result(stage.store, 0, result)
    log.info("prepared", policy=policy, teacher=teacher)


async def _teacher(stage: Stage) -> tuple[str, str]:
    """Return the version and, for a model on the hub, its commit: all replicas of all rounds serve that one."""
    teacher = stage.run.spec.teacher
    if teacher.endpoint is not None:
        return teacher.endpoint.version(teacher.model), ""
    version, origin = await teacher_version(stage)
    return version, (origin.revision or "") if isinstance(origin, Hub) else ""


async def _student(stage: Stage) -> str:
    """Store the initial student, point to it, and return its version."""
    student = stage.run.spec.student
    if student.endpoint is not None:
        return student.endpoint.version(student.model)
    origin = source(student.model, stage.store, "student.model")
    base_model = student.model
    if isinstance(origin, Hub):
        origin = Hub(origin.id, await commit(origin, "student.model"))
        base_model = f"{origin.id}@{origin.revision}"
    progress = _Progress(stage)
    folder = await fetch(origin, stage.store, stage.scratch / "student", "student.model", progress.comes)
    check_model(folder, "student.model", student.served)
    manifest = await save_policy(
        stage.store,
        _selected(folder, stage.scratch / "selected"),
        round=0,
        base_model=base_model,
        parent=None,
        data_digest=None,
        settings={},
        software={"dagger-operator": installed("dagger-operator")},
        tell=progress.goes,
    )
    await point_to(stage.store, manifest.version, 0)
    return manifest.version


class _Progress:
    """Progress in bytes of a model that is downloaded, if it is elsewhere, and then uploaded to the store."""

    def __init__(self, stage: Stage) -> None:
        self._reporter = Reporter(stage.store, 0, "prepare", "bytes")
        self._came = 0

    async def comes(self, done: int, total: int) -> None:
        self._came = total
        await self._reporter.tell(done, 2 * total)

    async def goes(self, done: int, total: int) -> None:
        await self._reporter.tell(self._came + done, self._came + total)


def _selected(folder: Path, into: Path) -> Path:
    """Return a folder of links to the files that make up the model: a version holds nothing else."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for path in model_files(folder):
        (into / path.name).symlink_to(path.resolve())
    return into


if __name__ == "__main__":
    sys.exit(main("prepare", prepare))
