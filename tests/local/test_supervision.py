"""Nothing outlives its supervisor."""

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from dagger_operator.local.machine import Machine, Place
from dagger_operator.local.processes import Reach

# What a container starts: a child in a session of its own, and one that overwrites its environment as programs do that rename themselves.
CHILDREN = """
import subprocess, sys, time
subprocess.Popen(["sleep", "601"], start_new_session=True)
forget = "import setproctitle, time; setproctitle.setproctitle('renamed'); print('up', flush=True); time.sleep(602)"
subprocess.Popen([sys.executable, "-c", forget], start_new_session=True)
time.sleep(600)
"""
SUPERVISOR = f"""
import asyncio, os, pathlib, sys
from dagger_operator.local.machine import Machine, Place
scope, folder = sys.argv[1], pathlib.Path(sys.argv[2])
template = {{"spec": {{"restartPolicy": "Never", "containers": [{{"name": "main", "command": ["python", "-c", {CHILDREN!r}]}}]}}}}
async def main():
    async with Machine(Place(scope, folder / "pods", folder / "logs", {{"PATH": os.environ["PATH"]}}, {{}})) as machine:
        machine.apply([{{"kind": "Job", "metadata": {{"name": "work"}}, "spec": {{"template": template}}}}])
        await asyncio.sleep(600)
asyncio.run(main())
"""


def _alive(reach: Reach) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if reach.holds(process)]


async def _started(scope: str, folder: Path) -> "subprocess.Popen[bytes]":
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, scope, str(folder)])
    log = folder / "logs/work-0/main.log"
    async with asyncio.timeout(60):
        while not (log.exists() and "up" in log.read_text()):
            await asyncio.sleep(0.05)
    return supervisor


async def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    scope = uuid.uuid4().hex
    reach = Reach(f"{scope}/", tmp_path / "logs")
    supervisor = await _started(scope, tmp_path)
    assert len(_alive(reach)) == 3, "the container, and both of its children"
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    async with asyncio.timeout(60):
        while _alive(reach):
            await asyncio.sleep(0.05)


async def test_what_even_the_guard_could_not_end_the_next_supervisor_ends(tmp_path: Path) -> None:
    scope = uuid.uuid4().hex
    reach = Reach(f"{scope}/", tmp_path / "logs")
    supervisor = await _started(scope, tmp_path)
    for process in psutil.Process(supervisor.pid).children():
        if "dagger_operator.local.guard" in process.cmdline():
            process.kill()
    supervisor.send_signal(signal.SIGKILL)
    supervisor.wait()
    assert _alive(reach)
    async with Machine(Place(scope, tmp_path / "pods", tmp_path / "logs", {"PATH": os.environ["PATH"]}, {})):
        assert not _alive(reach)
