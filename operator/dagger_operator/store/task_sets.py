"""The tasks in a run's two sets: recorded by the worker that reads them first, and fixed from then on."""

from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.records import Record


class TaskSet(Record):
    """The content of one task source."""

    revision: str | None = None
    """Commit of a data set on the Hugging Face hub; None for a file."""
    tasks: dict[str, str]
    """The first 16 hexadecimal digits of the SHA-256 of each task's row, by task id."""


class TaskSets(Record):
    training: TaskSet
    held_out: TaskSet


async def pin_task_sets(store: Store, sets: TaskSets) -> bool:
    """Put-if-absent: return False if the run has task sets already."""
    return await store.create(layout.TASKS, sets.model_dump_json(indent=1).encode())


async def read_task_sets(store: Store) -> TaskSets | None:
    """Return the task sets, or None if none have been recorded. Raises `DamagedObject` if they cannot be read."""
    found = await store.get(layout.TASKS)
    if found is None:
        return None
    try:
        return TaskSets.model_validate_json(found.data)
    except ValidationError as error:
        remedy = "delete it: it is written again from what spec.tasks names, so make sure that this is what it was"
        raise DamagedObject(layout.TASKS, f"does not say what this run's tasks are: {error.errors()[0]['msg']}", remedy) from error
