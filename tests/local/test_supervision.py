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
from dagger_operator.local.processes import MARK

SUPERVISOR = """
import asyncio, os, pathlib, sys
from dagger_operator.local.machine import Machine, Place
scope, folder = sys.argv[1], pathlib.Path(sys.argv[2])
code = "import subprocess, time; subprocess.Popen(['sleep', '601'], start_new_session=True); print('up', flush=True); time.sleep(600)"
template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "command": ["python", "-c", code]}]}}
async def main():
    async with Machine(Place(scope, folder / "pods", folder / "logs", {"PATH": os.environ["PATH"]}, {})) as machine:
        machine.apply([{"kind": "Job", "metadata": {"name": "work"}, "spec": {"template": template}}])
        await asyncio.sleep(600)
asyncio.run(main())
"""


def _alive(scope: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(scope) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


async def test_a_killed_supervisor_takes_containers_with_it_and_the_next_one_finds_the_rest(tmp_path: Path) -> None:
    scope = uuid.uuid4().hex
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, scope, str(tmp_path)])
    log = tmp_path / "logs/work-0/main.log"
    async with asyncio.timeout(60):
        while not (log.exists() and log.read_text()):
            await asyncio.sleep(0.05)
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        while any("time.sleep(600)" in line for line in _alive(scope)):
            await asyncio.sleep(0.05)
    async with Machine(Place(scope, tmp_path / "pods", tmp_path / "logs", {"PATH": os.environ["PATH"]}, {})):
        assert _alive(scope) == []
