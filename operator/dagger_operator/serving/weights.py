"""Init container of a serving pod: puts the version that should be served into the shared folder and points `current` at it.

Idempotent: complete files are reused, and an attempt that was killed is resumed.
"""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import asyncio
import hashlib
import sys
import time

import structlog

from dagger_operator.api import Role
from dagger_operator.serving.models import Folder, Hub, Source, Stored, check_model, commit, digest_folder, digest_stored, fetch, source
from dagger_operator.serving.shared import Shared
from dagger_operator.store.objects import StoreUnavailable
from dagger_operator.store.policies import load_policy, pointed
from dagger_operator.store.results import PrepareResult, read_result
from dagger_operator.store.stage import Stage, StageFailure, main

log = structlog.get_logger()

PATIENCE_SECONDS = 600.0
PAUSE_SECONDS = 10.0


async def weights(stage: Stage) -> None:
    """Run the stage. If a server spans several nodes, all are restarted when one container ends, so it waits for storage or the hub itself,
    up to `PATIENCE_SECONDS`; on a single-node server the kubelet restarts it."""
    spec = stage.run.spec
    serving = spec.student.served if role(stage) is Role.STUDENT else spec.teacher.serving
    until = time.monotonic() + (PATIENCE_SECONDS if serving is not None and serving.nodes > 1 else 0)
    while True:
        try:
            return await put_weights(stage)
        except (StoreUnavailable, StageFailure) as error:
            if (isinstance(error, StageFailure) and error.permanent) or time.monotonic() >= until:
                raise
            log.warning("weights are waited for", problem=str(error))
        await asyncio.sleep(PAUSE_SECONDS)


async def put_weights(stage: Stage) -> None:
    """Make `current` name a complete version. Raises `StageFailure`, `StoreUnavailable`, `DamagedObject`."""
    shared = Shared.of(stage)
    shared.folder("x").parent.mkdir(parents=True, exist_ok=True)
    version = await (_student(stage, shared) if role(stage) is Role.STUDENT else _teacher(stage, shared))
    shared.point(version)
    shared.prune({version})
    shared.remove_stale_socket()
    log.info("weights are in place", policy=version)


def role(stage: Stage) -> Role:
    """Return which policy this pod serves."""
    found = stage.environ.get("DAGGER_ROLE", "")
    try:
        return Role(found)
    except ValueError:
        raise StageFailure("IncompleteEnvironment", f"DAGGER_ROLE is {found!r}: it has to be student or teacher") from None


async def teacher_version(stage: Stage) -> tuple[str, Source]:
    """Return the version of a teacher served here and its source: pinned to a commit, or to the contents of its folder."""
    origin = source(stage.run.spec.teacher.model, stage.store, "teacher.model")
    match origin:
        case Hub(id):
            revision = await commit(origin, "teacher.model")
            return _named(f"{id}\n{revision}"), Hub(id, revision)
        case Folder(path):
            return _named(await asyncio.to_thread(digest_folder, path)), origin
        case Stored():
            return _named(await digest_stored(origin, stage.store, stage.scratch / "teacher", "teacher.model")), origin


def _named(content: str) -> str:
    return f"teacher-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


async def _student(stage: Stage, shared: Shared) -> str:
    pointer = await pointed(stage.store)
    if pointer is None:
        raise StageFailure("NotPrepared", "no policy version is named to be served: the prepare stage comes first", permanent=False)
    await load_policy(stage.store, pointer.policy, shared.folder(pointer.policy))
    return pointer.policy


async def _teacher(stage: Stage, shared: Shared) -> str:
    prepared = await read_result(stage.store, 0, PrepareResult)
    if prepared is None:
        raise StageFailure("NotPrepared", "the teacher's version is in the result of the prepare stage, which comes first", permanent=False)
    teacher, target = stage.run.spec.teacher, shared.folder(prepared.teacher)
    if target.is_dir() and not target.is_symlink():
        return prepared.teacher  # a complete copy of our own: only someone else's folder can have changed
    pinned = Hub(teacher.model, prepared.teacher_revision) if prepared.teacher_revision else None
    partial = target.with_name(target.name + ".partial")
    folder = await fetch(pinned or source(teacher.model, stage.store, "teacher.model"), stage.store, partial, "teacher.model")
    if pinned is None and (version := _named(await asyncio.to_thread(digest_folder, folder))) != prepared.teacher:
        raise StageFailure(
            "TeacherChanged",
            f"teacher.model {teacher.model!r} is not what it was when the run was prepared ({version}, not {prepared.teacher}): "
            "restore it, or make a new run",
        )
    check_model(folder, "teacher.model", teacher.serving)
    if folder == partial:
        partial.rename(target)
    elif not target.exists():
        target.symlink_to(folder.resolve())
    return prepared.teacher


if __name__ == "__main__":
    sys.exit(main("weights", weights))
