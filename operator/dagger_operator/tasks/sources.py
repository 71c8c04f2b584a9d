"""Loads tasks: this project's own rows as JSONL or Parquet, and rows of SWE-bench and SWE-Gym.

The worker that reads a run's two task sets first records them (`store.task_sets`), and every later worker compares what it reads with
that record: a rollout is named by its place in a shuffle, so other tasks would give a name another meaning.
"""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dagger_operator.api import SourceType, Storage, Tasks, TaskSource
from dagger_operator.api.errors import explain
from dagger_operator.store import layout
from dagger_operator.store.credentials import OwnIdentity
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.task_sets import TaskSet, TaskSets, pin_task_sets, read_task_sets
from dagger_operator.tasks import swe
from dagger_operator.tasks.deal import held_out_count
from dagger_operator.tasks.task import Task

_SUFFIXES = (".jsonl", ".json", ".parquet")
_DOCKER_HUB = ("docker.io", "index.docker.io")
_OWN = (SourceType.JSONL, SourceType.PARQUET)
Row = dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """All tasks of a source, in its order, and the digests that identify them."""

    tasks: tuple[Task, ...]
    content: TaskSet


async def load_training(spec: Tasks, store: Store, environ: Mapping[str, str]) -> tuple[Task, ...]:
    """Return the tasks to train on. Fails if one of them is held out, or if either set has changed."""
    return (await _both(spec, store, environ))[0]


async def load_held_out(spec: Tasks, store: Store, environ: Mapping[str, str]) -> tuple[Task, ...]:
    """Return the tasks to evaluate on. Fails if one of them is trained on, or if either set has changed."""
    return (await _both(spec, store, environ))[1]


async def load_tasks(source: TaskSource, store: Store, environ: Mapping[str, str], revision: str | None = None) -> Loaded:
    """Return all tasks of a source. `environ` holds the credentials of object storage under their cloud's names, `revision` is the commit
    to use of a data set on the Hugging Face hub (default: the newest).

    Raises `StageFailure` (`InvalidTasks`: names source, row, field and remedy) and `StoreUnavailable`.
    """
    rows, revision = await _rows(source, store, environ, revision)
    if source.split is not None and (named := sorted({str(row["split"]) for row in rows if row.get("split") is not None})):
        rows = [row for row in rows if row.get("split") == source.split]
        if not rows:
            raise _invalid(source, f"split {source.split!r} has no rows; there are: {', '.join(named)}")
    if not rows:
        raise _invalid(source, "it holds no rows: name a source that does")
    tasks = await asyncio.to_thread(lambda: tuple(_task(source, number, row) for number, row in enumerate(rows, 1)))
    first: dict[str, int] = {}
    for number, task in enumerate(tasks, 1):
        if task.id in first:
            raise _invalid(
                source, f"row {number}, field id: {task.id!r} is row {first[task.id]}'s already: give every task an id of its own"
            )
        first[task.id] = number
    digests = await asyncio.to_thread(lambda: dict(sorted((task.id, _digest(row)) for task, row in zip(tasks, rows, strict=True))))
    return Loaded(tasks, TaskSet(revision=revision, tasks=digests))


async def _both(spec: Tasks, store: Store, environ: Mapping[str, str]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    pinned = await read_task_sets(store)
    training = await load_tasks(spec.source, store, environ, pinned.training.revision if pinned else None)
    held_out = await load_tasks(spec.held_out.source, store, environ, pinned.held_out.revision if pinned else None)
    found = TaskSets(training=training.content, held_out=held_out.content)
    if pinned is not None:
        _require_same("spec.tasks.source", spec.source, pinned.training, found.training)
        _require_same("spec.tasks.heldOut.source", spec.held_out.source, pinned.held_out, found.held_out)
    else:
        # Check first, so that only usable sets are pinned: until then their rows may be fixed.
        _require_apart(found)
        held_out_count(held_out.tasks, spec.held_out)
        if not await pin_task_sets(store, found):
            return await _both(spec, store, environ)  # another worker was first, and its record counts
    return _mirrored(training.tasks, spec.image_prefix), _mirrored(held_out.tasks, spec.image_prefix)


def _require_apart(sets: TaskSets) -> None:
    if shared := sorted(sets.training.tasks.keys() & sets.held_out.tasks.keys()):
        raise StageFailure(
            "InvalidTasks",
            f"{len(shared)} tasks of spec.tasks.source are held out too, such as {', '.join(shared[:3])}: what is trained on cannot be "
            "evaluated on. Give the two sources different splits or files",
        )


def _require_same(field: str, source: TaskSource, was: TaskSet, now: TaskSet) -> None:
    changes = {
        "gone": was.tasks.keys() - now.tasks.keys(),
        "new": now.tasks.keys() - was.tasks.keys(),
        "changed": {id for id in was.tasks.keys() & now.tasks.keys() if was.tasks[id] != now.tasks[id]},
    }
    if said := [f"{len(ids)} {how}, such as {', '.join(sorted(ids)[:3])}" for how, ids in changes.items() if ids]:
        raise StageFailure(
            "TasksChanged",
            f"{field} {source.uri!r} no longer holds the tasks that it held when this run first read it: {'; '.join(said)}. Its rollouts "
            f"were dealt from those. Restore them ({layout.TASKS} below storage.url lists them) and resume the run, or make a new run with "
            "a new name",
        )


def _mirrored(tasks: tuple[Task, ...], prefix: str | None) -> tuple[Task, ...]:
    if not prefix:
        return tasks
    return tuple(task.model_copy(update={"image": _at_mirror(task.image, prefix)}) if task.image else task for task in tasks)


def _at_mirror(image: str, prefix: str) -> str:
    """Return the name of a Docker Hub image at a mirror, as pull-through caches and proxies name it; other registries' names unchanged.

    By Docker's rule, the part before the first slash is a registry if it has a dot or a colon, or is `localhost`, and a name without a
    slash belongs to `library/`.
    """
    registry, slash, name = image.partition("/")
    if slash and ("." in registry or ":" in registry or registry == "localhost"):
        if registry not in _DOCKER_HUB:
            return image
        image = name
    return f"{prefix.rstrip('/')}/{image if '/' in image else f'library/{image}'}"


async def _rows(source: TaskSource, store: Store, environ: Mapping[str, str], revision: str | None) -> tuple[list[Row], str | None]:
    """Return the rows, and their commit if they are on the hub."""
    if source.type not in _OWN and not source.uri.lower().endswith(_SUFFIXES):
        return await asyncio.to_thread(_hugging_face, source, revision)
    data = await _bytes(source, store, environ)
    parquet = source.type is SourceType.PARQUET or (source.type not in _OWN and source.uri.lower().endswith(".parquet"))
    return await asyncio.to_thread(_parquet if parquet else _jsonl, source, data), None


async def _bytes(source: TaskSource, store: Store, environ: Mapping[str, str]) -> bytes:
    uri = source.uri
    if "://" not in uri or uri.startswith("file://"):
        try:
            return await asyncio.to_thread(_file, uri.removeprefix("file://"))
        except OSError as error:
            raise _invalid(source, f"it cannot be read: {error.strerror}. Write the path of a file that this process can read") from error
    own = store.url.rstrip("/") + "/"
    if uri.startswith(own):
        found = await store.get(uri.removeprefix(own))
    else:
        folder, _, name = uri.rpartition("/")
        try:
            storage = Storage(url=folder)
        except ValidationError as error:
            raise _invalid(source, "it is no file, and no URL of object storage such as s3://bucket/tasks.jsonl") from error
        found = await Store.open(storage, OwnIdentity(environ)).get(name)
    if found is None:
        raise _invalid(source, "there is no such object")
    return found.data


def _file(path: str) -> bytes:
    return Path(path).expanduser().read_bytes()


def _jsonl(source: TaskSource, data: bytes) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _invalid(source, f"line {number} is no JSON ({error}): write one object a line") from error
            if not isinstance(row, dict):
                raise _invalid(source, f"line {number} is no object but {type(row).__name__}: write one object a line")
            rows.append(row)
    return rows


def _parquet(source: TaskSource, data: bytes) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(pa.BufferReader(data)).to_pylist(maps_as_pydicts="strict")
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _invalid(source, f"it is no whole Parquet file: {error}") from error
    return [_without_nulls(row) for row in rows]


def _without_nulls(row: Row) -> Row:
    """Remove null values: Parquet has every column in every row, so a null was not written."""
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in row.items() if value is not None}


def _hugging_face(source: TaskSource, revision: str | None) -> tuple[list[Row], str]:
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise _invalid(
            source, "data sets of the Hugging Face hub need the extra 'rollout': pip install 'dagger-operator[rollout]'"
        ) from error
    if source.split is None:
        raise _invalid(source, "a data set of the Hugging Face hub needs spec.tasks.source.split, such as train or test")
    try:
        builder = load_dataset_builder(source.uri, revision=revision)
        builder.download_and_prepare()
        rows = list(builder.as_dataset(split=source.split))
    except Exception as error:  # the library passes on whatever its transports raise
        raise StageFailure(
            "TasksUnavailable",
            f"data set {source.uri!r}, commit {revision or 'not named'}, split {source.split!r}: {type(error).__name__}: {error}. Check "
            "the id and the network, or export the rows to a .parquet or .jsonl file and name that",
            permanent=False,
        ) from error
    # The split was already selected; a column of that name means something else.
    return [{key: value for key, value in row.items() if key != "split"} for row in rows], builder.hash


def _digest(row: Row) -> str:
    # Values that JSON cannot represent, such as images or times, are not part of a task.
    text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
    return sha256(text.encode()).hexdigest()[:16]


def _task(source: TaskSource, number: int, row: Row) -> Task:
    try:
        match source.type:
            case SourceType.SWE_BENCH:
                return swe.swebench_task(row)
            case SourceType.SWE_GYM:
                return swe.swegym_task(row)
            case _:
                return Task.model_validate(_decoded(row))
    except swe.InvalidRow as error:
        raise _invalid(source, f"row {number}, {error}") from error
    except ValidationError as error:
        raise _invalid(source, f"row {number}, field {explain(error, Task).problems[0]}") from error


def _decoded(row: Row) -> Row:
    """Decode nested fields that are JSON text: Parquet has no suitable type for a mapping of file names."""
    decoded = dict(row)
    for field in ("files", "env", "grading"):
        if isinstance(value := row.get(field), str):
            with suppress(ValueError):  # the model's own error about a string is clearer
                decoded[field] = json.loads(value)
    return decoded


def _invalid(source: TaskSource, what: str) -> StageFailure:
    return StageFailure("InvalidTasks", f"task source {source.uri!r} ({source.type}): {what}")
