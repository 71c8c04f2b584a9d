"""What a provider leaves behind, whatever happens to it; and sandboxes without namespaces."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import dagger_operator
from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.isolation import probe
from dagger_operator.sandbox.process import ProcessSandboxes
from fixtures.sandboxes import Nap

OWNER = """
import asyncio, sys
from pathlib import Path
from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes

async def main():
    async with ProcessSandboxes(SandboxLimits(), Path(sys.argv[1])) as provider:
        sandbox = await provider.create(SandboxRequest("orphan", files={"f": "x"}), timeout=60)
        print((await sandbox.execute("id -u; cat f; ls /proc | grep -c '^[0-9]'", timeout=60)).output, flush=True)
        print(await sandbox.execute(sys.argv[2], timeout=600))

asyncio.run(main())
"""


FORKS = """
import os, time
try:
    for _ in range(600):
        if not os.fork():
            time.sleep(2)
            os._exit(0)
except OSError as error:
    print(error)
os.makedirs("closed/in")
os.chmod("closed", 0)
"""


async def test_an_owner_killed_leaves_no_processes_and_the_next_one_removes_its_folders(
    provider: ProcessSandboxes, tmp_path: Path, nap: Nap
) -> None:
    root = tmp_path / "shared"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(root), f"setsid -f {nap}; {nap}"], stdout=subprocess.PIPE)
    try:
        while nap.alive < 2:
            assert owner.poll() is None
            time.sleep(0.05)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    deadline = time.monotonic() + 30
    while nap.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert nap.alive == 0
    assert list(root.glob("*/*-orphan"))
    async with ProcessSandboxes(provider._limits, root) as first:
        assert not list(root.glob("*/*-orphan"))
        sandbox = await first.create(SandboxRequest("living", files={"f": "x"}), timeout=60)
        async with ProcessSandboxes(provider._limits, root):
            assert await sandbox.read("f") == b"x"
    assert not [path for path in root.iterdir() if path.name != ".sweeping"]
    groups = first.isolation.cgroups
    assert not [folder for parent in (groups.parents if groups else ()) for folder in parent.glob(f"dagger-{first._tenancy.name}*")]


def interpreter_of_ordinary_user() -> list[str] | None:
    """An interpreter that a user without rights can start with our packages; the test's own may lie in a closed folder."""
    search = os.pathsep.join([str(Path(dagger_operator.__file__).parent.parent), *(p for p in sys.path if p.endswith("site-packages"))])
    for python in (sys.executable, shutil.which("python3.11", path="/usr/bin:/usr/local/bin")):
        command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "env", "-i", f"PYTHONPATH={search}", "PATH=/usr/bin:/bin"]
        if (
            python
            and subprocess.run([*command, python, "-c", "import pydantic, structlog, psutil"], capture_output=True, check=False).returncode
            == 0
        ):
            return [*command, python]
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_an_ordinary_user_has_namespaces_and_limits_too(tmp_path: Path) -> None:
    if not probe().bubblewrap or (python := interpreter_of_ordinary_user()) is None:
        pytest.skip("no namespaces, or no interpreter that an ordinary user can start")
    root = Path("/var/tmp") / f"ordinary-{os.getpid()}"
    root.mkdir(mode=0o700)
    os.chown(root, 54321, 54321)
    try:
        # A shell would try a fork again for 15 s; a closed folder counts as a full disk while the command runs.
        bomb = f"exec {python[-1]} -c {shlex.quote(FORKS)}"
        done = subprocess.run([*python, "-c", OWNER, str(root), bomb], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("54321\nx"), done.stdout
        assert "WITHOUT" not in done.stdout and "Resource temporarily unavailable" in done.stdout
        assert [path.name for path in root.iterdir()] == [".sweeping"], "the closed folder, too"
    finally:
        shutil.rmtree(root)


async def test_without_namespaces_it_says_so_once_and_still_holds_deadlines_and_limits(
    plain: ProcessSandboxes, tmp_path: Path, nap: Nap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-worker")
    assert "WITHOUT namespaces (the test forbids it)" in plain.isolation.describe()
    sandbox = await plain.create(SandboxRequest("plain", files={"a/f": "x", "/tmp/g": "y"}), timeout=60)
    result = await sandbox.execute("pwd; cat a/f $TMPDIR/g; env | grep -c secret", timeout=60)
    assert result.output.endswith("work\nxy0\n")
    assert await sandbox.read("/testbed/a/f") == b"x" and await sandbox.read("/tmp/g") == b"y"
    result = await sandbox.execute(f"{nap} & {nap}", timeout=1)
    assert (result.returncode, nap.alive) == (124, 0)
    result = await sandbox.execute("for i in $(seq 300); do sleep 20 & done; wait", timeout=60)
    assert result.returncode == 137 and "more than 48 processes" in result.output
    assert (await sandbox.execute("head -c 100M /dev/zero > big", timeout=60)).returncode == 137
    await sandbox.execute(f"setsid -f {nap}", timeout=60)
    await sandbox.close()
    assert nap.alive == 0
    assert not list(tmp_path.glob("plain/*/*-plain"))


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SandboxError, match=r"NoFolder.*file/sandboxes.*name a folder that can be written"):
        await ProcessSandboxes(SandboxLimits(), tmp_path / "file" / "sandboxes").__aenter__()


async def test_the_warning_comes_when_a_provider_without_namespaces_starts(plain: ProcessSandboxes, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with ProcessSandboxes(plain._limits, tmp_path / "again", allow_unconfined=True, isolation=plain.isolation):
            pass
    assert [entry["log_level"] for entry in logs] == ["warning"] and "WITHOUT namespaces" in logs[0]["isolation"]


async def test_without_namespaces_there_are_no_sandboxes_unless_that_is_allowed(plain: ProcessSandboxes, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"NoNamespaces: .*the test forbids it\. Install bubblewrap, .*allowUnconfined: true"):
        await ProcessSandboxes(plain._limits, tmp_path / "refused", isolation=plain.isolation).__aenter__()
    assert not (tmp_path / "refused").exists()


async def test_what_is_allowed_is_not_done_where_there_are_namespaces(provider: ProcessSandboxes, tmp_path: Path) -> None:
    async with ProcessSandboxes(provider._limits, tmp_path / "both", allow_unconfined=True, isolation=provider.isolation) as best:
        sandbox = await best.create(SandboxRequest("one"), timeout=60)
        assert (await sandbox.execute("pwd", timeout=60)).output == "/testbed\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can do without")
def test_root_that_may_not_see_what_others_have_open_says_so() -> None:
    script = "from dagger_operator.sandbox.isolation import probe; print(probe().describe())"
    for options, says in (([], False), (["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"], True)):
        told = subprocess.run(["setpriv", *options, sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        if "WITHOUT namespaces" in told:
            pytest.skip(told)
        assert ("CAP_SYS_PTRACE" in told) is says
