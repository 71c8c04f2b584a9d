"""A Job on one machine does what it does on a cluster."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from dagger_operator.control import child
from dagger_operator.local.pods import Pod
from dagger_operator.local.processes import MARK

POLICY = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3]}}]}


async def test_every_index_runs_once_and_knows_its_number(lab: Any) -> None:
    code = "import os; print('index', os.environ['JOB_COMPLETION_INDEX'], end='')"
    lab.machine.apply([lab.job("work", code, completions=3, parallelism=2, completionMode="Indexed")])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Complete", "CompletionsReached")
    assert [lab.log(f"work-{index}") for index in range(3)] == ["index 0", "index 1", "index 2"]
    assert lab.status("work")["succeeded"] == 3
    ((_, pods),) = lab.machine.observed()
    assert [one["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for one in pods] == ["0", "1", "2"]


async def test_a_failed_pod_is_made_again_until_it_succeeds(lab: Any, tmp_path: Path) -> None:
    code = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'tried')!r}); seen = p.exists(); p.touch(); sys.exit(0 if seen else 75)"
    lab.machine.apply([lab.job("work", code, backoffLimit=2)])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Complete", "CompletionsReached")
    assert lab.status("work")["failed"] == 1


async def test_pods_that_failed_are_shown_until_their_job_goes_and_what_is_ignored_counts_on_no_budget(lab: Any, tmp_path: Path) -> None:
    code = f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'tries')!r}); n = len(p.read_text()) if p.exists() else 0; "
    code += "p.write_text('x' * (n + 1)); sys.exit(75 if n < 2 else 0)"
    ignored = {"rules": [{"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}}]}
    lab.machine.apply([lab.job("work", code, backoffLimit=0, podFailurePolicy=ignored)])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Complete", "CompletionsReached")
    ((_, pods),) = lab.machine.observed()
    assert [one["status"]["phase"] for one in pods] == ["Failed", "Failed", "Succeeded"]
    assert len(child({"kind": "Job", "metadata": {"name": "work"}, "spec": {}}, pods, datetime.now(UTC)).failures) == 2


async def test_a_job_whose_budget_is_spent_fails_and_keeps_the_last_words(lab: Any) -> None:
    code = "import os, sys; open(os.environ['DAGGER_TERMINATION_LOG'], 'w').write('the disk is full'); sys.exit(1)"
    lab.machine.apply([lab.job("work", code, backoffLimit=1)])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Failed", "BackoffLimitExceeded")
    assert lab.container_state("work")["state"]["terminated"]["message"] == "the disk is full"


async def test_the_end_of_the_log_stands_in_for_a_missing_termination_message(lab: Any) -> None:
    job = lab.job(
        "work", "raise SystemExit('no such model')", container={"terminationMessagePolicy": "FallbackToLogsOnError"}, backoffLimit=0
    )
    lab.machine.apply([job])
    await lab.until(lambda: lab.end("work"))
    assert "no such model" in lab.container_state("work")["state"]["terminated"]["message"]


async def test_a_pod_whose_folder_cannot_be_made_is_a_failed_pod_and_tried_again_when_it_can(lab: Any) -> None:
    lab.place.folder.write_text("in the way")  # as a disk that is full, or one that may not be written
    lab.machine.apply([lab.job("work", "print('up', end='')", backoffLimit=6), lab.job("other", "pass", backoffLimit=0)])
    await lab.until(lambda: lab.end("other"))
    assert lab.end("other") == ("Failed", "BackoffLimitExceeded")
    ended = lab.container_state("other")["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError") and "pods/other-0: Not a directory" in ended["message"]
    await lab.until(lambda: lab.status("work")["failed"] == 1)
    lab.place.folder.unlink()
    await lab.until(lambda: lab.end("work"))
    assert (lab.end("work"), lab.log("work-0")) == (("Complete", "CompletionsReached"), "up")


async def test_a_job_ends_without_its_last_words_where_its_logs_were_removed(lab: Any) -> None:
    code = f"import shutil, sys; shutil.rmtree({str(lab.place.logs)!r}); sys.exit(1)"
    lab.machine.apply([lab.job("work", code, container={"terminationMessagePolicy": "FallbackToLogsOnError"}, backoffLimit=1)])
    await lab.until(lambda: lab.end("work"))
    assert (lab.end("work"), lab.status("work")["failed"]) == (("Failed", "BackoffLimitExceeded"), 2)


async def test_a_fault_of_ours_fails_the_job_in_its_words(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(pod: Pod) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(Pod, "run", broken)
    lab.machine.apply([lab.job("work", "pass")])
    await lab.until(lambda: lab.end("work"))
    (condition,) = lab.status("work")["conditions"]
    assert (condition["type"], condition["reason"]) == ("Failed", "RuntimeError")
    assert condition["message"] == "ZeroDivisionError: nobody thought of this"


async def test_an_exit_code_that_no_retry_mends_fails_the_job_at_once(lab: Any) -> None:
    lab.machine.apply([lab.job("work", "raise SystemExit(3)", backoffLimit=6, podFailurePolicy=POLICY)])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Failed", "PodFailurePolicy")
    assert lab.status("work")["failed"] == 0


async def test_a_job_that_misses_its_deadline_fails(lab: Any) -> None:
    lab.machine.apply([lab.job("work", "import time; time.sleep(600)", activeDeadlineSeconds=1)])
    await lab.until(lambda: lab.end("work"))
    assert lab.end("work") == ("Failed", "DeadlineExceeded")
    assert lab.status("work")["active"] == 0


async def test_suspending_ends_pods_and_resuming_runs_only_what_is_left(lab: Any, tmp_path: Path) -> None:
    code = f"""
import os, pathlib, time
index = os.environ['JOB_COMPLETION_INDEX']
(pathlib.Path({str(tmp_path)!r}) / f'ran-{{index}}-{{os.getpid()}}').touch()
time.sleep(0 if index == '0' else 600)
"""
    options = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    lab.machine.apply([lab.job("work", code, **options)])
    await lab.until(lambda: lab.status("work")["succeeded"] == 1 and list(tmp_path.glob("ran-1-*")))

    lab.machine.apply([lab.job("work", code, suspend=True, **options)])
    await lab.until(lambda: lab.status("work")["active"] == 0)
    assert [c["type"] for c in lab.status("work")["conditions"]] == ["Suspended"]

    lab.machine.apply([lab.job("work", code, suspend=False, **options)])
    await lab.until(lambda: len(list(tmp_path.glob("ran-1-*"))) == 2)
    assert len(list(tmp_path.glob("ran-0-*"))) == 1


async def test_what_a_container_started_dies_with_it(lab: Any) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, end='')"
    lab.machine.apply([lab.job("work", code)])
    await lab.until(lambda: lab.end("work"))
    assert not psutil.pid_exists(int(lab.log("work-0")))


async def test_a_removed_job_is_shown_until_its_last_process_is_gone(lab: Any) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit(0))); print('up', flush=True); time.sleep(600)"
    )
    lab.machine.apply([lab.job("work", code)])
    await lab.until(lambda: "running" in lab.container_state("work")["state"] and "up" in lab.log("work-0"))
    lab.machine.remove("Job", "work")
    await asyncio.sleep(0)
    assert lab.pods("work"), "still ending, so still there"
    await lab.until(lambda: not lab.pods("work"))
    assert not [p for p in psutil.process_iter() if _marked(p, lab.place.scope)]


def _marked(process: psutil.Process, scope: str) -> bool:
    try:
        return process.environ().get(MARK, "").startswith(scope)
    except (psutil.Error, OSError):
        return False
