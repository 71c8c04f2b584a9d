"""What a command does to the helper that holds it: both run as the same user, and the helper holds it all the same.

Also under gVisor's kernel, which delivers to process 1 what Linux drops, and knows no other calls than its own.
"""

import asyncio
import resource
import socket
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

SIGNALS = """
import ctypes, fcntl, os, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CALLS = {"x86_64": (129, 200, 234, 297), "aarch64": (138, 130, 131, 240)}[os.uname().machine]
sigqueue, tkill, tgkill, tgsigqueue = CALLS
def call(number, *arguments):
    if libc.syscall(number, *arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def info(number):
    return ctypes.create_string_buffer(struct.pack("iii", number, 0, -1), 128)
def by_number(number):
    yield lambda: os.kill(1, number)
    yield lambda: call(sigqueue, 1, number, info(number))
def by_thread(number):
    thread = int(max(os.listdir("/proc/1/task"), key=int)) if os.path.exists("/proc/1/task") else 1
    yield lambda: os.kill(thread, number)
    yield lambda: call(tkill, thread, number)
    yield lambda: call(tgkill, 1, thread, number)
    yield lambda: call(tgsigqueue, 1, thread, number, info(number))
def by_file(number):
    yield lambda: signal.pidfd_send_signal(os.pidfd_open(1), number)
    yield lambda: signal.pidfd_send_signal(os.open("/proc/1", os.O_RDONLY), number)
def by_descriptor(number):
    ours, theirs = socket.socketpair()
    yield lambda: fcntl.fcntl(ours, fcntl.F_SETOWN, 1)
    yield lambda: fcntl.fcntl(ours, fcntl.F_SETSIG, number)
    yield lambda: fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    yield lambda: theirs.send(b"x")
for number in range(1, 65):
    for way in globals()[sys.argv[1]](number):
        try:
            way()
        except OSError:
            pass
        time.sleep(0.002)
print("sent")
"""

CONNECTIONS = """
import socket, sys, time
held, most = [], int(sys.argv[2])
while True:
    while len(held) < most:
        one = socket.socket()
        one.settimeout(5)
        try:
            one.connect(("127.0.0.1", int(sys.argv[1])))
            one.send(b"GET / HTTP/1.1\\r\\nHost: helper\\r\\n\\r\\n" if len(held) % 2 else b"GET")
        except OSError:
            break
        held.append(one)
    print(len(held), flush=True)
    time.sleep(0.2)
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


@pytest.mark.parametrize("way", ["by_number", "by_thread", "by_file", "by_descriptor"])
async def test_no_signal_of_a_command_ends_its_helper_however_it_is_sent(any_helper: Any, way: str) -> None:
    sandbox = await any_helper.create(SandboxRequest("signals", files={"signals.py": SIGNALS}), timeout=60)
    assert (await asyncio.wait_for(sandbox.execute(f"python3 signals.py {way}", timeout=20), 30)).output == "sent\n"
    await asyncio.wait_for(lives(sandbox), 30)
    # And a command's own faults still end it, as it ends its own processes.
    assert (await sandbox.execute("kill -SEGV $$", timeout=60)).returncode == 139
    assert (await sandbox.execute("sleep 60 & kill -9 $!; wait $!; echo $?", timeout=60)).output.endswith("137\n")


async def test_under_either_kernel_a_command_is_held_and_nothing_of_it_outlives_it(any_helper: Any) -> None:
    sandbox = await any_helper.create(SandboxRequest("held", files={"file": "kept"}), timeout=60)
    result = await sandbox.execute("cat file; echo ' too' >&2; setsid sleep 987 & exit 7", timeout=60)
    assert (result.output, result.returncode, result.timed_out) == ("kept too\n", 7, False)
    result = await sandbox.execute("setsid sleep 987 & sleep 987", timeout=1)
    assert (result.returncode, result.timed_out) == (124, True)
    result = await sandbox.execute("for i in $(seq 200); do sleep 987 & done; wait", timeout=60)
    assert result.returncode == 137 and "[stopped: it used more than 48 processes]" in result.output
    left = "grep -l ^sleep /proc/[0-9]*/comm 2>/dev/null || echo none"
    result = await sandbox.execute(f"{left}; yes | head -c 200000; echo; echo end", timeout=60)
    assert result.output.startswith("none\n") and result.output.endswith("\nend\n") and result.truncated
    assert await sandbox.read("file") == b"kept"


async def test_a_helper_that_cannot_look_stops_the_command_and_leaves_nothing_of_it(helper: Any, nap: Nap) -> None:
    sandbox = await helper.create(SandboxRequest("blind"), timeout=60)
    running = asyncio.create_task(sandbox.execute(f"setsid {nap} & {nap}", timeout=20))
    await there(lambda: nap.alive == 2)
    process = process_of(helper)
    usual = process.rlimit(resource.RLIMIT_NOFILE)
    process.rlimit(resource.RLIMIT_NOFILE, (3, usual[1]))
    result = await running
    await there(lambda: nap.alive == 0)  # it cannot see that what it killed is gone
    process.rlimit(resource.RLIMIT_NOFILE, usual)
    assert (result.returncode, result.timed_out) == (137, False)
    assert "[stopped: it used what is needed to look after it" in result.output
    await lives(sandbox)


@pytest.mark.parametrize("way", ["to the helper", "to the gateway"])
async def test_connections_of_a_command_leave_its_helper_what_it_needs_to_look_and_to_answer(helper: Any, way: str) -> None:
    with socket.create_server(("127.0.0.2", 0), backlog=4096) as gateway:
        port = gateway.getsockname()[1]
        request = SandboxRequest("many", files={"connections.py": CONNECTIONS}, network_to=f"127.0.0.2:{port}")
        sandbox = await helper.create(request, timeout=60)
        process, target = process_of(helper), helper.port if way == "to the helper" else port
        running = asyncio.create_task(sandbox.execute(f"python3 connections.py {target} 1500", timeout=60))
        await there(lambda: max((one.num_fds() for one in process.children()), default=0) > 1500)
        for _ in range(10):
            assert process.num_fds() < 900
            await asyncio.sleep(0.1)
        assert await asyncio.wait_for(sandbox.read("connections.py"), 10) == CONNECTIONS.encode()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await lives(sandbox)
