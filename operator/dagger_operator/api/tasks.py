"""What agents work on: task sources, tasks per round, and held-out tasks."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from dagger_operator.api.model import ApiModel


class SourceType(StrEnum):
    JSONL = "JSONL"
    PARQUET = "Parquet"
    SWE_GYM = "SWEGym"
    SWE_BENCH = "SWEbench"


class TaskSource(ApiModel):
    """Where tasks come from."""

    type: SourceType
    """Format and grading of the rows. JSONL and Parquet contain this project's own task rows (docs/data-format.md)."""
    uri: Annotated[str, Field(min_length=1, max_length=2048)]
    """A file, a URL of object storage, or a Hugging Face data set id."""
    split: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Rows to use: the split of a data set, or the rows of a file whose `split` field has this value; all by default."""


class HeldOut(ApiModel):
    """Tasks used for evaluation only. A task id that is also in the training source is refused."""

    source: TaskSource
    count: Annotated[int, Field(ge=1, le=100000)] | None = None
    """Number of tasks, the first ones in the order of a seeded shuffle; all by default."""


class Tasks(ApiModel):
    """Tasks to train on, and held-out tasks."""

    source: TaskSource
    per_round: Annotated[int, Field(ge=1, le=100000)] = 512
    """Tasks per round. A seeded shuffle deals them out: no task repeats before all have been used once."""
    first_round: Annotated[int, Field(ge=1, le=100000)] | None = None
    """Tasks of round 1, if it should differ from `perRound`."""
    rollouts_per_task: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of attempts at each task."""
    held_out: HeldOut
    """The tasks used for evaluation."""
    image_prefix: Annotated[str, Field(max_length=512)] | None = None
    """Mirror of Docker Hub, such as `registry.example.com/docker-hub`: replaces `docker.io/` in the names of tasks' images, or is put in
    front of names without a registry. Images of other registries keep their names. It may be changed during a run."""

    def count_at(self, round_number: int) -> int:
        """Return the number of tasks of a round; rounds count from 1."""
        return self.first_round if round_number == 1 and self.first_round else self.per_round
