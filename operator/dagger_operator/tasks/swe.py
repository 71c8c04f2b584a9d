"""Rows of SWE-bench and SWE-Gym as tasks.

Rows of SWE-bench have to say themselves how they are graded, as swebench 5 has them: `SWE-bench/SWE-bench_Verified`, `_Lite`,
`_Multilingual` and their exports. SWE-Gym's published rows do not; `swegym` adds it for its repositories.
Gold patches and hints are dropped when a row is read.
"""

from typing import Any

from dagger_operator.tasks import swegym
from dagger_operator.tasks.task import SwebenchGrading, Task

_GRADING = ("instance_id", "image", "repo", "version", "FAIL_TO_PASS", "PASS_TO_PASS", "log_parser", "eval_type", "eval_script")
"""What swebench's `make_test_spec` reads."""
_ENV = {"BASH_ENV": "/root/.bashrc"}
"""The images' Python with the project is the conda environment `testbed`, and only this file activates it. It is read by `bash -c` where
BASH_ENV names it, which is also mini-swe-agent's way (`config/benchmarks/swebench.yaml`); grading scripts activate it themselves."""


class MissingColumns(ValueError):
    """A row that lacks what grading needs."""


def swebench_task(row: dict[str, Any]) -> Task:
    """A row of SWE-bench. Raises `MissingColumns`."""
    remedy = "rows of princeton-nlp/* lack them: use SWE-bench/SWE-bench_Verified or another data set of SWE-bench/*"
    return _task(row, "swebench", "_1776_", remedy)


def swegym_task(row: dict[str, Any]) -> Task:
    """A row of SWE-Gym. Raises `MissingColumns`."""
    remedy = (
        f"SWE-Gym's own rows are known for {', '.join(swegym.REPOSITORIES)}, and need repo, base_commit and test_patch; give others an "
        "eval_script (the shell script that runs the tests between swebench's markers), a log_parser of swebench such as "
        "parse_log_pytest, and eval_type pass_and_fail"
    )
    return _task({**swegym.grading_of(row), **row}, "xingyaoww", "_s_", remedy)


def _task(row: dict[str, Any], owner: str, separator: str, remedy: str) -> Task:
    if not row.get("instance_id"):
        raise MissingColumns("field instance_id: missing: every row needs one")
    name = str(row["instance_id"]).lower().replace("__", separator)
    row = {**row, "image": row.get("image") or f"docker.io/{owner}/sweb.eval.x86_64.{name}:latest"}
    if missing := [column for column in (*_GRADING, "problem_statement") if row.get(column) is None]:
        raise MissingColumns(f"field {', '.join(missing)}: missing: {remedy}")
    grading = {column: row[column] for column in _GRADING}
    return Task(
        id=row["instance_id"], statement=row["problem_statement"], image=row["image"], env=_ENV, grading=SwebenchGrading(row=grading)
    )
