"""SWE-Gym's rows as they are published become tasks that swebench grades."""

import json
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import SourceType, TaskSource
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.store.objects import Store
from dagger_operator.tasks import swegym
from dagger_operator.tasks.grading import grade
from dagger_operator.tasks.sources import load_tasks
from dagger_operator.tasks.task import SwebenchGrading, Task

PATCH = """\
diff --git a/tests/test_add.py b/tests/test_add.py
--- a/tests/test_add.py
+++ b/tests/test_add.py
@@ -1,2 +1,4 @@
 def test_zero():
     assert True
+def test_add():
+    assert open("lib.py").read().strip() == "right"
diff --git a/tests/data.json b/tests/data.json
new file mode 100644
--- /dev/null
+++ b/tests/data.json
@@ -0,0 +1 @@
+{}
"""
FIX = "diff --git a/lib.py b/lib.py\n--- a/lib.py\n+++ b/lib.py\n@@ -1 +1 @@\n-wrong\n+right\n"


def row(commit: str, **changes: Any) -> dict[str, Any]:
    """As in the data set SWE-Gym/SWE-Gym, less what is not read."""
    published = {
        "instance_id": "Project-MONAI__MONAI-1",
        "repo": "Project-MONAI/MONAI",
        "version": "0.4",
        "base_commit": commit,
        "problem_statement": "It is wrong.",
        "patch": "the solution",
        "test_patch": PATCH,
        "FAIL_TO_PASS": ["tests/test_add.py::test_add"],
        "PASS_TO_PASS": ["tests/test_add.py::test_zero"],
    }
    return {**published, **changes}


async def test_a_published_row_becomes_a_task_without_its_solution(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("abc")) + "\n")
    (task,) = (await load_tasks(TaskSource(type=SourceType.SWE_GYM, uri=str(path)), store, {})).tasks
    assert task.image == "docker.io/xingyaoww/sweb.eval.x86_64.project-monai_s_monai-1:latest"
    assert isinstance(task.grading, SwebenchGrading)
    assert "the solution" not in task.model_dump_json()
    script = task.grading.row["eval_script"]
    assert "pytest -rA tests/test_add.py\n" in script and "git checkout abc tests/test_add.py\n" in script


def test_mypy_is_tested_by_the_names_of_its_cases() -> None:
    patch = "diff --git a/test-data/unit/check.test b/test-data/unit/check.test\n+[case testOne]\n+[case testTwo]\n"
    script = swegym.grading_of(row("abc", repo="python/mypy", test_patch=patch))["eval_script"]
    assert "pytest -n0 -rA -k 'testOne or testTwo'\n" in script


@pytest.mark.parametrize("change", [{"repo": "owner/other"}, {"test_patch": ""}, {"base_commit": None}])
def test_a_row_that_says_too_little_is_left_as_it_is(change: dict[str, Any]) -> None:
    assert swegym.grading_of(row("abc", **change)) == {}


@pytest.mark.heavy
@pytest.mark.filterwarnings("default")  # of swebench's own imports
@pytest.mark.parametrize(("patch", "resolved"), [(FIX, True), ("", False)])
async def test_such_a_task_is_graded_by_swebench(tmp_path: Path, provider: ProcessSandboxes, patch: str, resolved: bool) -> None:
    from swebench.harness import constants

    assert (constants.START_TEST_OUTPUT, constants.END_TEST_OUTPUT) == (swegym.START, swegym.END)
    files = {"lib.py": "wrong\n", "tests/test_add.py": "def test_zero():\n    assert True\n"}
    identity = "git init -q . && git add -A && git -c user.name=a -c user.email=a@b -c commit.gpgsign=false"
    commit = f"{identity} commit -qm one && git tag base"
    # The image would bring pytest; here a stand-in of three lines runs the tests and reports as it does.
    program = (
        "import runpy, sys\n"
        "for name, test in runpy.run_path(sys.argv[2]).items():\n"
        "    if name.startswith('test_'):\n"
        "        try:\n            test(); said = 'PASSED'\n"
        "        except AssertionError:\n            said = 'FAILED'\n"
        "        print(said, f'{sys.argv[2]}::{name}')\n"
    )

    script_row = row("base", image="none", **swegym.grading_of(row("base")))
    script_row["eval_script"] = script_row["eval_script"].replace("pytest -rA", "python3 .pytest.py -rA")
    grading = {key: value for key, value in script_row.items() if key not in ("patch", "test_patch", "problem_statement", "base_commit")}
    task = Task(
        id="one",
        statement="It is wrong.",
        files={**files, ".pytest.py": program},
        setup=commit,
        grading=SwebenchGrading(row=grading),
    )
    found = await grade(task, patch, provider, name="grade", create_timeout=60, timeout=60)
    assert found.resolved is resolved, found.log
