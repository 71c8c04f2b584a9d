"""Rows of SWE-bench and SWE-Gym as tasks.

Rows of SWE-bench must state themselves how they are graded, as in swebench 5: `SWE-bench/SWE-bench_Verified`, `_Lite`,
`_Multilingual` and their exports. SWE-Gym's published rows do not; `swegym` adds it for its repositories.
Gold patches and hints are dropped when a row is read.
"""

import json
from typing import Any

from dagger_operator.tasks import swebench, swegym
from dagger_operator.tasks.task import SwebenchGrading, Task

_GRADING = ("instance_id", "image", "repo", "version", "FAIL_TO_PASS", "PASS_TO_PASS", "log_parser", "eval_type", "eval_script")
"""The fields that swebench's `make_test_spec` reads."""
_ENV = {"BASH_ENV": "$(if [ -r /root/.bashrc ]; then echo /root/.bashrc; fi)"}
"""The images' Python with the project is the conda environment `testbed`, and only this file activates it. `bash -c` reads the file named
by BASH_ENV, which is also how mini-swe-agent does it (`config/benchmarks/swebench.yaml`); grading scripts activate it themselves.

Bash expands the variable. Commands that do not run as root cannot read the file: if it were named anyway, bash would complain about it in
the first line of every command's output."""


class InvalidRow(ValueError):
    """A row that can never be graded; the message names field and remedy."""


def swebench_task(row: dict[str, Any]) -> Task:
    """Convert a row of SWE-bench. Raises `InvalidRow`, and `StageFailure` if swebench is not installed, as `swegym_task` does."""
    remedy = "rows of princeton-nlp/* lack them: use SWE-bench/SWE-bench_Verified or another data set of SWE-bench/*"
    return _task(row, "swebench", "_1776_", remedy)


def swegym_task(row: dict[str, Any]) -> Task:
    """Convert a row of SWE-Gym. Raises `InvalidRow`."""
    remedy = (
        f"SWE-Gym's own rows are known for {', '.join(swegym.REPOSITORIES)}, and need repo, base_commit and test_patch; give others an "
        "eval_script (the shell script that runs the tests between swebench's markers), a log_parser of swebench such as "
        "parse_log_pytest, and eval_type pass_and_fail"
    )
    return _task({**swegym.grading_of(row), **row}, "xingyaoww", "_s_", remedy)


def _task(row: dict[str, Any], owner: str, separator: str, remedy: str) -> Task:
    if not row.get("instance_id"):
        raise InvalidRow("field instance_id: missing: every row needs one")
    name = str(row["instance_id"]).lower().replace("__", separator)
    row = {**row, "image": row.get("image") or f"docker.io/{owner}/sweb.eval.x86_64.{name}:latest"}
    if missing := [column for column in (*_GRADING, "problem_statement") if row.get(column) is None]:
        raise InvalidRow(f"field {', '.join(missing)}: missing: {remedy}")
    _check(row)
    grading = {column: row[column] for column in _GRADING}
    return Task(
        id=row["instance_id"], statement=row["problem_statement"], image=row["image"], env=_ENV, grading=SwebenchGrading(row=grading)
    )


def _check(row: dict[str, Any]) -> None:
    """Raise `InvalidRow` for a row on which swebench would fail, which it would do only after the agent has done its work."""
    for field in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        if not _names_tests(row[field]):
            raise _invalid(field, row[field], 'write a list of test names or its JSON text, such as ["tests/test_a.py::test_b"]')
    if not isinstance(row["eval_script"], str):
        raise _invalid("eval_script", row["eval_script"], "write the whole shell script as one text")
    for field, known in swebench.choices().items():
        if row[field] not in known:
            raise _invalid(field, row[field], f"swebench knows {', '.join(known)}")


def _names_tests(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _invalid(field: str, value: Any, remedy: str) -> InvalidRow:
    return InvalidRow(f"field {field}: got {str(value)[:80]!r}: {remedy}")
