"""What a worker who is not root sees of its commands."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagger_operator.sandbox.isolation import probe

pytestmark = pytest.mark.skipif(not probe().bubblewrap, reason=f"no namespaces here: {probe().reason}")

_NOBODY = 65534
_WORKER = """
import asyncio, concurrent.futures.thread, ctypes, json, os, sys
from pathlib import Path
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.isolation import probe
from dagger_operator.sandbox.process import ProcessSandboxes
from fixtures.sandboxes import LIMITS

async def main(root, command, files):
    found = probe(cgroups=False)
    if not found.bubblewrap:
        return {"without": found.reason}
    async with ProcessSandboxes(LIMITS, Path(root), isolation=found) as provider:
        sandbox = await provider.create(SandboxRequest("one", files=files), timeout=60)
        result = await sandbox.execute(command, timeout=60)
        return {"output": result.output, "returncode": result.returncode}

user, given = json.loads(sys.argv[1])
if os.geteuid() == 0:  # only now: that user may not read this Python
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process that had always been that user's
print(json.dumps(asyncio.run(main(*given))))
"""
_HOLDS = """
import ctypes, os, time
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
held = [os.memfd_create("held") for _ in range(25)]
for one in held:
    os.write(one, bytes(20 << 20))
time.sleep(5)
"""
_ENDS = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        os._exit(0)
time.sleep(1)
print("well")
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of that user's, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="dgr-"))
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def executed(folder: Path, command: str, **files: str) -> tuple[str, int]:
    """A command of a worker who is not root: its output and exit code."""
    given = json.dumps([_NOBODY, [str(folder / "sandboxes"), command, {f"{name}.py": text for name, text in files.items()}]])
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, given], env=environ, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if why := found.get("without"):
        pytest.skip(f"no namespaces for others than root: {why}")
    return found["output"], found["returncode"]


def test_a_command_that_runs_what_nobody_may_read_is_stopped(folder: Path) -> None:
    output, returncode = executed(folder, "cp /usr/bin/sleep closed && chmod 111 closed && ./closed 20")
    assert returncode == 137 and "a process that nobody can look into" in output


def test_memory_of_a_command_that_asks_to_be_hidden_counts(folder: Path) -> None:
    output, returncode = executed(folder, "python3 holds.py", holds=_HOLDS)
    assert returncode == 137 and "more than 256 MiB of memory" in output


def test_processes_that_have_ended_are_nothing_that_hides(folder: Path) -> None:
    assert executed(folder, "python3 ends.py", ends=_ENDS) == ("well\n", 0)
