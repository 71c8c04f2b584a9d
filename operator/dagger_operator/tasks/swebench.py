"""swebench's grading without Docker: its evaluation script runs in one of our sandboxes, its own parser reads the log outside of it."""

import asyncio
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import structlog

from dagger_operator.sandbox.interface import Sandbox
from dagger_operator.store.stage import StageFailure

APPLY = ("git apply --verbose", "git apply --verbose --3way", "git apply --verbose --reject", "patch --batch --forward --fuzz=5 -p1 -i")
"""Commands with which swebench's harness tries to apply a patch (swebench 5.0, `run_evaluation.GIT_APPLY_CMDS`)."""
_SCRIPT, _LOG = "dagger-eval.sh", "dagger-eval.log"
"""In /tmp: in the repository, cleaning would remove them, and they would be part of what is tested."""
_MAX_LOG_BYTES = 64 << 20


@dataclass(frozen=True)
class Evaluated:
    """Result of running an evaluation script."""

    log: str
    returncode: int
    timed_out: bool


def choices() -> dict[str, list[str]]:
    """Return the values that swebench knows for a row's fields, by field. Blocks."""
    library = _library()
    return {"log_parser": list(library.log_parsers.PARSER_REGISTRY), "eval_type": [kind.value for kind in library.constants.EvalType]}


async def evaluate(sandbox: Sandbox, row: dict[str, Any], *, timeout: float) -> Evaluated:
    """Run a row's evaluation script; the whole log is kept, since a parser that sees half of it misjudges.

    The log is empty if what ran removed it; a broken sandbox raises `SandboxError`. The patch can print into the log whatever it likes,
    as in swebench's own harness, which checks it against the tests' exit code.
    """
    script = await asyncio.to_thread(lambda: _library().utils.make_test_spec(row).eval_script)
    await sandbox.write({f"/tmp/{_SCRIPT}": script})  # noqa: S108 - a path inside the sandbox
    # TMPDIR is set where there are no namespaces and the sandbox's /tmp is elsewhere.
    done = await sandbox.execute(f'tmp="${{TMPDIR:-/tmp}}"; bash "$tmp/{_SCRIPT}" > "$tmp/{_LOG}" 2>&1', timeout=timeout)
    log = await sandbox.read(f"/tmp/{_LOG}", limit=_MAX_LOG_BYTES) or b""  # noqa: S108
    return Evaluated(log.decode("utf-8", "replace"), done.returncode, done.timed_out)


def judge(row: dict[str, Any], patch: str, log: str) -> bool:
    """Return whether swebench considers the patch resolved. Blocks.

    If it suspects the environment, this is logged and changes nothing, as in its own scores: it goes by words in the log, which a patch
    can print, as does a script that installs something without a network.
    """
    library = _library()
    prediction = {"instance_id": row["instance_id"], "model_name_or_path": "student", "model_patch": patch}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.write_text(log)
        report = library.grading.get_eval_report(library.utils.make_test_spec(row), prediction, str(path), include_tests_status=False)[
            row["instance_id"]
        ]
    if report["infra_failure"]:
        reason = report["infra_failure_reason"]
        structlog.get_logger().warning("swebench suspects the environment", instance=row["instance_id"], reason=reason, log=log[-300:])
    return bool(report["resolved"])


@cache
def _library() -> Any:
    """Return swebench's harness: 4 s of imports, once, and only if there are such tasks."""
    # It reads a dotenv file at import, from wherever it finds one.
    os.environ.setdefault("PYTHON_DOTENV_DISABLED", "1")
    try:
        from swebench import harness
    except ImportError as error:
        raise StageFailure("MissingExtra", f"grading SWE-bench tasks needs the extra 'rollout': {error}") from error
    return harness
