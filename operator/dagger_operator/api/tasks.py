"""What agents work on: task sources, how many a round takes, what is held out."""

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
    """Format and grading of the rows. JSONL and Parquet hold this project's own task rows (docs/data-format.md)."""
    uri: Annotated[str, Field(min_length=1, max_length=2048)]
    """A file, a URL of object storage, or a Hugging Face data set id."""
    split: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Rows to use: of a data set its split, of a file the rows whose `split` field says so; default all."""


class HeldOut(ApiModel):
    """Tasks that are only ever evaluated on. A task id that stands in the training source too is refused."""

    source: TaskSource
    count: Annotated[int, Field(ge=1, le=100000)] | None = None
    """How many, the first ones in the order of a seeded shuffle; default all."""


class Tasks(ApiModel):
    """Tasks to train on, and tasks held out."""

    source: TaskSource
    per_round: Annotated[int, Field(ge=1, le=100000)] = 512
    """Tasks of one round. A seeded shuffle deals them out: none comes twice before all came once."""
    first_round: Annotated[int, Field(ge=1, le=100000)] | None = None
    """Tasks of round 1, where it should differ from `perRound`."""
    rollouts_per_task: Annotated[int, Field(ge=1, le=64)] = 1
    """Attempts at each task."""
    held_out: HeldOut
    """The tasks that evaluation uses."""
    image_prefix: Annotated[str, Field(max_length=512)] | None = None
    """Mirror of Docker Hub, such as `registry.example.com/docker-hub`: stands in the place of `docker.io/` in the names of tasks' images,
    or before them. Images of other registries keep their names. It may be changed in a run."""

    def count_at(self, round_number: int) -> int:
        """Tasks of a round; rounds count from 1."""
        return self.first_round if round_number == 1 and self.first_round else self.per_round
