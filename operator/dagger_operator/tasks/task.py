"""A task in the form common to all sources."""

import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_Value = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]


class ScriptGrading(BaseModel):
    """A hidden check: files added to the sandbox only after the agent has ended, and a command whose exit code 0 means resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["Script"] = "Script"
    files: dict[str, str] = {}
    command: str


class SwebenchGrading(BaseModel):
    """Graded by swebench: the row that `make_test_spec` and `get_eval_report` read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["SWEbench"] = "SWEbench"
    row: dict[str, Any]


class Task(BaseModel):
    """One task."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """Unique within a run."""
    statement: str
    """The agent's instructions."""
    image: str | None = None
    workdir: str = "/testbed"
    files: dict[str, str] = {}
    """Text files that the sandbox starts with, relative to `workdir`."""
    # Omitted if empty, so that rows without it keep the form they had before this field existed.
    env: Annotated[dict[_Name, _Value], Field(exclude_if=operator.not_)] = {}
    """Environment of the agent's commands, in addition to PATH, HOME and LANG. Setup, patches and grading do not get it."""
    setup: str | None = None
    """Command run once before the agent starts; its failure is an infrastructure failure."""
    grading: ScriptGrading | SwebenchGrading
    split: str | None = None
