"""What a command does to the helper that holds it: both run as the same user, and the helper holds it all the same."""

import asyncio
import resource
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.pod_sandbox import PodSandbox
from fixtures.sandboxes import Nap

pytestmark = pytest.mark.heavy

ON_HELPER = """
import ctypes, os, resource
def tried(what, call):
    try:
        call()
        print(what, "done")
    except PermissionError:
        print(what, "refused")
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}[os.uname().machine]
def idle_io(kind, who):
    if ctypes.CDLL(None).syscall(IOPRIO_SET, kind, who, 3 << 13):
        raise PermissionError
few, idle = (64, 64), (os.SCHED_IDLE, os.sched_param(0))
thread = int(max(os.listdir("/proc/1/task"), key=int))
for name, pid in {"helper": 1, "thread of it": thread, "itself": 0, "its child": os.fork() or os._exit(0)}.items():
    if name != "its child":
        tried(f"limits of {name}", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, few))
    tried(f"processors of {name}", lambda: os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))}))
    tried(f"policy of {name}", lambda: os.sched_setscheduler(pid, *idle))
    tried(f"priority of {name}", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    tried(f"input of {name}", lambda: idle_io(1, pid))
tried("priority of the user", lambda: os.setpriority(os.PRIO_USER, 0, 19))
tried("input of the user", lambda: idle_io(3, 0))
resource.prlimit(1, resource.RLIMIT_NOFILE)
"""


def process_of(helper: Any) -> psutil.Process:
    """The helper, as seen from outside."""
    return next(one for one in psutil.process_iter(["cmdline"]) if f"-listen=127.0.0.1:{helper.port}" in (one.info["cmdline"] or ())[1:3])


async def there(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not look():
            await asyncio.sleep(0.05)


async def lives(sandbox: PodSandbox) -> None:
    assert (await sandbox.execute("echo alive", timeout=60)).output == "alive\n"


async def test_a_command_sets_its_own_limits_and_schedule_and_never_its_helpers(helper: Any) -> None:
    sandbox = await helper.create(SandboxRequest("limits", files={"on_helper.py": ON_HELPER}), timeout=60)
    result = await sandbox.execute("python3 on_helper.py", timeout=60)
    said = dict(line.rsplit(" ", 1) for line in result.output.splitlines())
    assert result.returncode == 0 and len(said) == 21
    for what, answer in said.items():
        assert answer == ("done" if what.endswith(("itself", "its child")) else "refused"), what
    # As shells and their users do it.
    result = await sandbox.execute("ulimit -n 100; prlimit --pid $$ --nofile=50:50; ulimit -n; renice -n 19 -p $$ > /dev/null", timeout=60)
    assert (result.output, result.returncode) == ("50\n", 0)
    await lives(sandbox)


async def test_a_helper_that_cannot_look_stops_the_command_and_leaves_nothing_of_it(helper: Any, nap: Nap) -> None:
    sandbox = await helper.create(SandboxRequest("blind"), timeout=60)
    running = asyncio.create_task(sandbox.execute(f"setsid {nap} & {nap}", timeout=20))
    await there(lambda: nap.alive == 2)
    process = process_of(helper)
    usual = process.rlimit(resource.RLIMIT_NOFILE)
    process.rlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
    result = await running
    assert nap.alive == 0
    process.rlimit(resource.RLIMIT_NOFILE, usual)
    assert (result.returncode, result.timed_out) == (137, False)
    assert "[stopped: it used what is needed to look after it" in result.output
    await lives(sandbox)
