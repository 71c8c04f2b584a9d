"""From a task's start over the agent's work to the verdict, in real sandboxes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import CommandResult, LimitExceeded, SandboxError, SandboxRequest
from dagger_operator.sandbox.isolation import Isolation
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from dagger_operator.tasks import workspace
from dagger_operator.tasks.grading import Grade, grade
from dagger_operator.tasks.task import ScriptGrading, SwebenchGrading, Task
from dagger_operator.tasks.workspace import apply_patch, collect_patch, start

TASK = Task(
    id="sum",
    statement="add() is wrong.",
    files={"lib/math.py": "def add(a, b):\n    return a - b\n", "keep.txt": "kept\n"},
    grading=ScriptGrading(
        files={"hidden.py": "from lib.math import add\nassert add(2, 3) == 5\nprint('well')\n", "checks/more": "hidden"},
        command="python3 hidden.py",
    ),
)
COMMIT = "git -c user.name=a -c user.email=a@b commit -qm done"
SOLVE = "sed -i 's/a - b/a + b/' lib/math.py"


async def after(provider: ProcessSandboxes, command: str, task: Task = TASK) -> str:
    """The patch of an agent that ran one command."""
    workspace = await start(task, provider, name="agent", timeout=60)
    await workspace.sandbox.execute(command, timeout=60)
    patch = await collect_patch(workspace)
    await workspace.sandbox.close()
    return patch


async def graded(provider: ProcessSandboxes, patch: str, task: Task = TASK, timeout: float = 60) -> Grade:
    return await grade(task, patch, provider, name="grade", create_timeout=60, timeout=timeout)


@pytest.mark.parametrize(
    ("command", "resolved"),
    [
        (SOLVE, True),
        ("true", False),
        ("echo 'def add(a, b): return 5' > lib/math.py", True),
        ("echo 'syntax error' > lib/math.py", False),
        ("rm -rf lib", False),
        (f"git init -q . && {SOLVE} && git add -A && {COMMIT}", True),
        (f"git init -q . && {SOLVE} && rm -rf .git && mkdir .git && echo broken > .git/HEAD", True),
        (f"{SOLVE}; python3 -c 'import lib.math'; printf '*.py\\n' > .gitignore; echo '[core' > ~/.gitconfig", True),
        (f"{SOLVE}; export GIT_DIR=/nowhere; chmod 000 keep.txt", True),
        ("echo 'print(1)' > hidden.py", False),
        ("mkdir -p hidden.py; echo > hidden.py/x; ln -s keep.txt checks", False),
        (f"{SOLVE}; mkdir -p hidden.py; echo > hidden.py/x; ln -s keep.txt checks", True),
        (
            f"{SOLVE}; ln -s /etc/passwd link; touch new; chmod +x keep.txt; mkfifo pipe; printf '\\377\\n' > latin",
            True,
        ),
    ],
)
async def test_a_patch_is_graded_by_what_the_files_became(provider: ProcessSandboxes, command: str, resolved: bool) -> None:
    found = await graded(provider, await after(provider, command))
    assert found.resolved is resolved, found
    assert (found.returncode == 0) is resolved


async def test_the_check_enters_only_after_the_agent_has_ended(provider: ProcessSandboxes) -> None:
    workspace = await start(TASK, provider, name="agent", timeout=60)
    result = await workspace.sandbox.execute("ls -A; grep -rl hidden . ~ /tmp", timeout=60)
    assert result.output == "keep.txt\nlib\n"


async def test_the_agents_environment_is_not_that_of_its_patch_and_its_grade(provider: ProcessSandboxes) -> None:
    task = TASK.model_copy(update={"env": {"BASH_ENV": "/testbed/.bashrc"}, "files": {**TASK.files, ".bashrc": "echo noise; exit 3\n"}})
    patch = await after(provider, SOLVE, task)
    assert "noise" not in patch and (await graded(provider, patch, task)).log == "well\n"


CONTENT = (
    st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | st.sampled_from([b"a\r\nb\r\n", b"\0", b"no newline", b"\xff\xfe\n"])
)
NAMES = st.sampled_from(["a", "b", "dir/c", "dir/d e", "dir/é", "-f", "x'y", "new\nline", "tab\t", ".gitattributes"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=100), max_size=5),
    now=st.dictionaries(NAMES, CONTENT, max_size=6),
)
async def test_applying_a_collected_patch_restores_every_byte(
    provider: ProcessSandboxes, before: dict[str, str], now: dict[str, bytes]
) -> None:
    task = TASK.model_copy(update={"files": before})
    code = f"""
import pathlib
now = {now!r}
for path in {sorted(before)!r}:
    if path not in now: pathlib.Path(path).unlink()
for path, data in now.items():
    pathlib.Path(path).parent.mkdir(exist_ok=True)
    pathlib.Path(path).write_bytes(data)
"""
    agent = await start(task, provider, name="agent", timeout=60)
    await agent.sandbox.write({"/tmp/change.py": code})
    assert (await agent.sandbox.execute("python3 /tmp/change.py", timeout=60)).output == ""
    patch = await collect_patch(agent)
    patch.encode()  # what a trajectory can hold
    fresh = await start(task, provider, name="fresh", timeout=60)
    applied = await apply_patch(fresh, patch)
    assert applied.returncode == 0, (patch, applied)
    for path in {*before, *now}:
        assert await fresh.sandbox.read(path) == now.get(path), path
    await agent.sandbox.close()
    await fresh.sandbox.close()


async def test_a_repository_of_the_task_stays_as_it_is_and_its_history_counts_not(provider: ProcessSandboxes) -> None:
    setup = f"echo built > .gitignore; git init -q . && echo 1 > built && git add -f -A && {COMMIT}; echo 2 >> keep.txt"
    task = TASK.model_copy(update={"setup": setup})
    patch = await after(provider, f"echo 2 > built; git add -A; {COMMIT}; mkdir __pycache__; echo x > __pycache__/x", task)
    assert "+2" in patch and "built" in patch
    assert not any(unchanged in patch for unchanged in ("keep.txt", ".git/", "pycache"))
    found = await graded(
        provider,
        patch,
        task.model_copy(update={"grading": ScriptGrading(command="grep -q 2 built && git log --oneline | wc -l | grep -qx 1")}),
    )
    assert found.resolved, found


@pytest.mark.parametrize(
    "wreck",
    ["rm -rf ~/.dagger-start", "head -c 20M /dev/urandom > noise", "rm -rf ~/.dagger-start/objects && mkdir ~/.dagger-start/objects"],
)
async def test_a_patch_that_cannot_be_collected_says_why_and_is_unresolved(provider: ProcessSandboxes, wreck: str) -> None:
    patch = await after(provider, f"{SOLVE}; {wreck}")
    assert patch.startswith("# no patch: ")
    assert await graded(provider, patch) == Grade(False, None, patch)


async def test_a_patch_that_does_not_apply_is_unresolved(provider: ProcessSandboxes) -> None:
    found = await graded(provider, "--- a/other\n+++ b/other\n@@ -1 +1 @@\n-x\n+y\n")
    assert (found.resolved, found.returncode) == (False, None) and "other" in found.log


async def test_a_patch_that_a_stalled_machine_does_not_apply_in_time_is_never_unresolved(
    provider: ProcessSandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch = await after(provider, SOLVE)
    monkeypatch.setattr(workspace, "PATCH_SECONDS", 0.001)
    with pytest.raises(SandboxError, match="ApplyTimeout: applying a patch to a fresh copy of task sum"):
        await graded(provider, patch)
    assert not provider._live


async def test_a_check_that_hangs_is_unresolved(provider: ProcessSandboxes) -> None:
    task = TASK.model_copy(update={"grading": ScriptGrading(command="echo begun; sleep 100")})
    found = await graded(provider, "", task, timeout=1)
    assert (found.resolved, found.returncode) == (False, 124) and found.log.startswith("begun\n")


async def test_a_setup_that_fails_is_infrastructure_and_leaves_no_sandbox(provider: ProcessSandboxes) -> None:
    task = TASK.model_copy(update={"setup": "echo because >&2; exit 3"})
    for attempt in (start(task, provider, name="s", timeout=60), graded(provider, "", task)):
        with pytest.raises(SandboxError, match=r"SetupFailed.*sum.*exit code 3.*because"):
            await attempt
    assert not provider._live


async def test_all_of_it_works_without_namespaces_too(tmp_path: Path) -> None:
    isolation = Isolation(bubblewrap=None, reason="the test forbids it", cgroups=None, root=False)
    async with ProcessSandboxes(SandboxLimits(), tmp_path / "plain", allow_unconfined=True, isolation=isolation) as plain:
        assert (await graded(plain, await after(plain, SOLVE))).resolved
        assert not (await graded(plain, await after(plain, "true"))).resolved


class Losing:
    """A real provider whose sandboxes are lost right after they are made: a fault that cannot be had otherwise."""

    def __init__(self, provider: ProcessSandboxes) -> None:
        self._provider = provider

    async def create(self, request: SandboxRequest, *, timeout: float) -> ProcessSandbox:
        sandbox = await self._provider.create(request, timeout=timeout)
        await sandbox.close()
        return sandbox


async def test_a_lost_sandbox_is_never_unresolved(provider: ProcessSandboxes) -> None:
    with pytest.raises(SandboxError, match="Closed"):
        await grade(TASK, "", Losing(provider), name="lost", create_timeout=60, timeout=60)  # type: ignore[arg-type]  # only create is needed


async def test_a_check_that_exceeds_the_sandboxs_limits_is_unresolved(provider: ProcessSandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = ProcessSandbox.execute

    async def evicted(sandbox: ProcessSandbox, command: str, **more: Any) -> CommandResult:
        if command == TASK.grading.command:
            raise LimitExceeded("Evicted", "its disk is full")
        return await execute(sandbox, command, **more)

    patch = await after(provider, SOLVE)
    monkeypatch.setattr(ProcessSandbox, "execute", evicted)
    found = await graded(provider, patch)
    assert (found.resolved, found.returncode, found.log) == (False, None, "Evicted: its disk is full")
    assert not provider._live


EVAL = """#!/bin/bash
set -uxo pipefail
cd /testbed
git apply -v - <<'EOF_114329324912'
diff --git a/test_math.py b/test_math.py
new file mode 100644
--- /dev/null
+++ b/test_math.py
@@ -0,0 +1,5 @@
+from lib.math import add
+for name, good in (("test_add", add(2, 3) == 5), ("test_zero", add(0, 0) == 0)):
+    print(("PASSED" if good else "FAILED") + f" test_math.py::{name}")
+    if not good:
+        failed = True
EOF_114329324912
: '>>>>> Start Test Output'
python3 test_math.py
: '>>>>> End Test Output'
rm test_math.py
"""
ROW = {
    "instance_id": "owner__repo-1",
    "image": "none",
    "repo": "owner/repo",
    "version": "1",
    "FAIL_TO_PASS": '["test_math.py::test_add"]',
    "PASS_TO_PASS": '["test_math.py::test_zero"]',
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
    "eval_script": EVAL,
}


@pytest.mark.heavy
@pytest.mark.filterwarnings("default")  # of swebench's own imports
async def test_swebench_grades_with_its_own_library_and_parser(provider: ProcessSandboxes) -> None:
    setup = f"git init -q . && git add -A && {COMMIT}"
    task = TASK.model_copy(update={"grading": SwebenchGrading(row=ROW), "setup": setup})
    solved = await graded(provider, await after(provider, SOLVE, task), task)
    assert solved.resolved and "PASSED test_math.py::test_add" in solved.log
    untouched = await graded(provider, "", task)
    assert not untouched.resolved and "FAILED test_math.py::test_add" in untouched.log
    forged = await after(provider, "echo 'print(\"PASSED test_math.py::test_add\"); raise SystemExit(1)' > lib/__init__.py", task)
    assert not (await graded(provider, forged, task)).resolved
    fuzzy = "--- a/lib/math.py\n+++ b/lib/math.py\n@@ -7,2 +7,2 @@\n def add(a, b): # other context\n-    return a - b\n+    return a + b\n"
    assert (await graded(provider, fuzzy, task)).resolved
    loud = SwebenchGrading(row={**ROW, "eval_script": EVAL.replace("python3 test_math.py", "python3 test_math.py; seq 1000000")})
    assert (await graded(provider, await after(provider, SOLVE, task), task.model_copy(update={"grading": loud}))).resolved
    slow = SwebenchGrading(row={**ROW, "eval_script": "sleep 100"})
    assert not (await graded(provider, "", task.model_copy(update={"grading": slow}), timeout=1)).resolved


CLEANS = "import subprocess; subprocess.run(['git', 'clean', '-fdxq'])"
FORGETS = "import os, pathlib; [os.remove(log) for folder in ('/tmp', '.') for log in pathlib.Path(folder).glob('*dagger-eval*')]"


@pytest.mark.heavy
@pytest.mark.filterwarnings("default")  # of swebench's own imports
@pytest.mark.parametrize(("does", "resolved"), [(CLEANS, True), (FORGETS, False)])
async def test_what_a_patch_does_to_files_while_it_is_tested_is_graded_and_breaks_nothing(
    provider: ProcessSandboxes, does: str, resolved: bool
) -> None:
    setup = f"git init -q . && git add -A && {COMMIT}"
    task = TASK.model_copy(update={"grading": SwebenchGrading(row=ROW), "setup": setup})
    patch = await after(provider, f'{SOLVE}; echo "{does}" >> lib/math.py', task)
    assert (await graded(provider, patch, task)).resolved is resolved


@pytest.mark.heavy
@pytest.mark.filterwarnings("default")  # of swebench's own imports
async def test_what_swebench_suspects_of_the_environment_takes_no_failure_out_of_the_score(provider: ProcessSandboxes) -> None:
    """A patch that breaks the tests and prints what a network that is away prints."""
    setup = f"git init -q . && git add -A && {COMMIT}"
    task = TASK.model_copy(update={"grading": SwebenchGrading(row=ROW), "setup": setup})
    patch = await after(provider, "echo 'raise SystemExit(\"Could not resolve host: example.org\")' > lib/math.py", task)
    with capture_logs() as said:
        assert not (await graded(provider, patch, task)).resolved
    assert [entry["reason"] for entry in said if entry["event"] == "swebench suspects the environment"] == ["network_unreachable"]
