"""What every kind of sandbox promises: processes, the helper of pods, and pods."""

import asyncio
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.sandbox.interface import Sandbox, SandboxError, SandboxProvider, SandboxRequest
from fixtures.sandboxes import Nap


async def test_files_stay_between_commands_and_processes_do_not(any_sandbox: Sandbox) -> None:
    result = await any_sandbox.execute("echo kept | tee file /tmp/file ~/file; sleep 300 & echo started", timeout=60)
    assert result.output == "kept\nstarted\n" and result.seconds < 60
    result = await any_sandbox.execute("cat file /tmp/file ~/file; grep -l '^sleep' /proc/[0-9]*/comm 2>/dev/null || echo none", timeout=60)
    assert result.output == "kept\nkept\nkept\nnone\n"


async def test_exit_codes_and_both_streams_in_order(any_sandbox: Sandbox) -> None:
    result = await any_sandbox.execute("echo 1; echo 2 >&2; echo 3; exit 7", timeout=60)
    assert (result.output, result.returncode, result.truncated, result.timed_out) == ("1\n2\n3\n", 7, False, False)
    assert (await any_sandbox.execute("kill -SEGV $$", timeout=60)).returncode == 139
    assert (await any_sandbox.execute("read line || echo nothing to read", timeout=60)).output == "nothing to read\n"


async def test_a_missed_deadline_kills_everything_the_command_started(any_sandbox: Sandbox, nap: Nap) -> None:
    started = time.monotonic()
    result = await any_sandbox.execute(f"(setsid {nap} &); (setsid nohup {nap} >/dev/null 2>&1 &) ; {nap}", timeout=1)
    assert (result.returncode, result.timed_out) == (124, True) and "did not end within 1 s" in result.output
    assert time.monotonic() - started < 30
    assert nap.alive == 0


async def test_a_cancelled_command_is_killed(any_sandbox: Sandbox, nap: Nap) -> None:
    task = asyncio.create_task(any_sandbox.execute(f"touch began; {nap}; touch ended", timeout=600))
    await _begun(nap)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert nap.alive == 0
    assert (await any_sandbox.execute("ls", timeout=60)).output == "began\n"


async def test_cancelling_at_any_moment_leaves_the_sandbox_ready_for_the_next_command(any_sandbox: Sandbox, nap: Nap) -> None:
    for delay in (0.0, 0.001, 0.005, 0.02, 0.1):
        task = asyncio.create_task(any_sandbox.execute(str(nap), timeout=600))
        await asyncio.sleep(delay)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled() and nap.alive == 0
        assert (await any_sandbox.execute("echo next", timeout=60)).output == "next\n"


async def test_closing_ends_what_runs_and_may_be_done_twice(any_provider: SandboxProvider, nap: Nap) -> None:
    sandbox = await any_provider.create(SandboxRequest("two", files={"f": "x"}), timeout=120)
    running = asyncio.create_task(sandbox.execute(str(nap), timeout=600))
    await _begun(nap)
    await asyncio.gather(sandbox.close(), sandbox.close())
    with pytest.raises(SandboxError, match="Closed"):
        await running
    deadline = time.monotonic() + 30
    while nap.alive and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert nap.alive == 0
    await sandbox.close()
    with pytest.raises(SandboxError, match="Closed"):
        await sandbox.execute("true", timeout=60)


async def test_a_command_that_cannot_be_passed_on_is_answered_as_a_shell_would(any_sandbox: Sandbox) -> None:
    for command in ("echo \0", "true " + "x" * 200_000):
        result = await any_sandbox.execute(command, timeout=60)
        assert result.returncode == 126 and "write long text to a file in parts" in result.output
    assert (await any_sandbox.execute("true " + "x" * 130_000, timeout=60)).returncode == 0
    assert (await any_sandbox.execute("echo '\ud800'", timeout=60)).output == "?\n"


async def test_the_environment_is_clean_and_the_workdir_may_lie_deep(any_provider: SandboxProvider) -> None:
    request = SandboxRequest("deep", workdir="/srv/a/b", files={"f": "1"}, env={"GIVEN": "a b'c"})
    sandbox = await any_provider.create(request, timeout=120)
    result = await sandbox.execute("pwd; cat /srv/a/b/f; env -0 | tr '\\0' '\\n'", timeout=60, env={"ALSO": "1"})
    folder, *lines = result.output.splitlines()
    assert (folder, lines[0][0]) == ("/srv/a/b", "1")
    lines[0] = lines[0][1:]
    assert {line.split("=")[0] for line in lines} == {"PATH", "HOME", "LANG", "GIVEN", "ALSO", "PWD", "SHLVL", "_"}
    assert "GIVEN=a b'c" in lines
    await sandbox.close()


@pytest.mark.parametrize("workdir", ["testbed", "/", "/a/../b"])
async def test_a_workdir_that_cannot_be_is_refused_with_a_remedy(any_provider: SandboxProvider, workdir: str) -> None:
    if type(any_provider).__name__ == "HelperAlone":
        pytest.skip("the provider refuses, not the helper")
    with pytest.raises(SandboxError, match=r"InvalidWorkdir.*such as /testbed"):
        await any_provider.create(SandboxRequest("bad", workdir=workdir), timeout=60)


async def test_reading_what_is_no_file_is_none_and_never_hangs(any_sandbox: Sandbox) -> None:
    await any_sandbox.execute("mkdir folder; mkfifo fifo; ln -s /dev/zero zero; head -c 3000000 /dev/zero > large", timeout=60)
    for path in ("missing", "folder", "fifo", "zero"):
        assert await any_sandbox.read(path) is None
    assert len(await any_sandbox.read("large") or b"") == 1 << 20


async def test_a_file_replaces_a_planted_link_and_does_not_follow_it(any_sandbox: Sandbox) -> None:
    await any_sandbox.execute("echo untouched > target; ln -s target link; mkfifo fifo", timeout=60)
    await any_sandbox.write({"link": "written", "fifo": "written"})
    result = await any_sandbox.execute("cat target link fifo; [ -L link ] || [ -p fifo ] || echo files", timeout=60)
    assert result.output == "untouched\nwrittenwrittenfiles\n"


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, text=st.text(max_size=2000))
async def test_what_is_written_is_read_back(any_sandbox: Sandbox, name: str, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    await any_sandbox.write({f"folder/{name}": text, f"/tmp/{name}": "other"})
    assert await any_sandbox.read(f"folder/{name}") == text.encode()
    assert await any_sandbox.read(f"/testbed/folder/{name}", limit=5) == text.encode()[:5]
    assert await any_sandbox.read(f"/tmp/{name}") == b"other"


async def test_output_is_bounded_at_its_source(any_sandbox: Sandbox) -> None:
    result = await any_sandbox.execute("echo first; head -c 20000000 /dev/zero | tr '\\0' x; echo last", timeout=120)
    assert result.returncode == 0 and result.truncated
    assert result.output.startswith("first\n") and result.output.endswith("xlast\n")
    dropped = 20_000_000 + len("first\nlast\n") - (64 << 10)
    assert f"\n[{dropped} bytes left out]\n" in result.output


async def test_limits_stop_a_command_and_leave_the_sandbox_well(any_sandbox: Sandbox) -> None:
    bomb = await any_sandbox.execute("bomb() { bomb | bomb & }; bomb; sleep 2; echo over", timeout=10)
    assert "Resource temporarily unavailable" in bomb.output or bomb.returncode == 137
    hog = await any_sandbox.execute("x=x; while :; do x=$x$x; done", timeout=60)
    assert hog.returncode != 0 and not hog.timed_out
    big = await any_sandbox.execute("head -c 100000000 /dev/zero > big", timeout=60)
    assert big.returncode == 137 and "24 MiB" in big.output
    await any_sandbox.execute("rm -f big", timeout=60)
    assert (await any_sandbox.execute("echo alive", timeout=60)).output == "alive\n"


async def _begun(nap: Nap) -> None:
    """A pod's processes are seen from here on our own cluster only; elsewhere some time has to do."""
    if "DAGGER_TEST_KUBECONFIG" in os.environ:
        await asyncio.sleep(3)
        return
    deadline = time.monotonic() + 60
    while not nap.alive:
        assert time.monotonic() < deadline, f"{nap} never began"
        await asyncio.sleep(0.02)
