"""What commands in a sandbox can do, and how they end."""

import asyncio
import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.sandbox.command import BoundedOutput
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox


async def test_the_usual_tools_work(sandbox: ProcessSandbox) -> None:
    code = "import json, sqlite3; print(6 * 7)"
    command = "printf 'a\\nb\\n' > f && sed -i s/b/c/ f && grep c f && git init -q . && git add f && id -un"
    result = await sandbox.execute(f"{command} && python3 -c '{code}'", timeout=60)
    assert (result.output, result.returncode) == ("c\nagent\n42\n", 0)


async def test_files_stay_between_commands_and_processes_do_not(sandbox: ProcessSandbox) -> None:
    result = await sandbox.execute("echo kept | tee file /tmp/file ~/file; sleep 300 & echo started", timeout=60)
    assert result.output == "kept\nstarted\n" and result.seconds < 60
    result = await sandbox.execute("cat file /tmp/file ~/file; pgrep sleep || echo none", timeout=60)
    assert result.output == "kept\nkept\nkept\nnone\n"


async def test_exit_codes_and_both_streams_in_order(sandbox: ProcessSandbox) -> None:
    result = await sandbox.execute("echo 1; echo 2 >&2; echo 3; exit 7", timeout=60)
    assert (result.output, result.returncode, result.truncated, result.timed_out) == ("1\n2\n3\n", 7, False, False)
    assert (await sandbox.execute("kill -SEGV $$", timeout=60)).returncode == 139
    assert (await sandbox.execute("read line || echo nothing to read", timeout=60)).output == "nothing to read\n"


async def test_a_missed_deadline_kills_everything_the_command_started(sandbox: ProcessSandbox, alive: Callable[[str], int]) -> None:
    started = time.monotonic()
    result = await sandbox.execute("setsid -f sleep 98761; (setsid nohup sleep 98761 >/dev/null 2>&1 &) ; sleep 98761", timeout=1)
    assert (result.returncode, result.timed_out) == (124, True) and "did not end within 1 s" in result.output
    assert time.monotonic() - started < 30
    assert alive("98761") == 0


async def test_a_cancelled_command_is_killed(sandbox: ProcessSandbox, alive: Callable[[str], int]) -> None:
    task = asyncio.create_task(sandbox.execute("sleep 98762", timeout=600))
    while not alive("98762"):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert alive("98762") == 0
    assert (await sandbox.execute("echo still here", timeout=60)).output == "still here\n"


async def test_cancelling_again_and_again_leaves_no_process_behind(sandbox: ProcessSandbox, alive: Callable[[str], int]) -> None:
    for delay in (0.0, 0.001, 0.005, 0.02, 0.1):
        task = asyncio.create_task(sandbox.execute("sleep 98767", timeout=600))
        await asyncio.sleep(delay)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled() and alive("98767") == 0
    gc.collect()  # a process that nobody waited for warns here, and a warning is an error


async def test_closing_ends_what_runs_removes_everything_and_may_be_done_twice(
    provider: ProcessSandboxes, tmp_path: Path, alive: Callable[[str], int]
) -> None:
    sandbox = await provider.create(SandboxRequest("two", files={"f": "x"}), timeout=60)
    running = asyncio.create_task(sandbox.execute("sleep 98763", timeout=600))
    while not alive("98763"):
        await asyncio.sleep(0.02)
    await asyncio.gather(sandbox.close(), sandbox.close())
    with pytest.raises(SandboxError, match="Closed"):
        await running
    assert alive("98763") == 0
    await sandbox.close()
    with pytest.raises(SandboxError, match="Closed"):
        await sandbox.execute("true", timeout=60)
    assert not list(tmp_path.glob("sandboxes/*/*two*"))


async def test_sixty_four_sandboxes_at_once_do_not_mix(provider: ProcessSandboxes) -> None:
    async def one(number: int) -> str:
        sandbox = await provider.create(SandboxRequest(f"n{number}", files={"number": str(number)}), timeout=240)
        result = await sandbox.execute("sleep 0.2; cat number; ls /tmp; touch /tmp/mine", timeout=240)
        await sandbox.close()
        return result.output

    assert await asyncio.gather(*(one(number) for number in range(64))) == [str(number) for number in range(64)]


async def test_a_command_that_cannot_be_passed_on_is_answered_as_a_shell_would(sandbox: ProcessSandbox) -> None:
    for command in ("echo \0", "true " + "x" * 200_000):
        result = await sandbox.execute(command, timeout=60)
        assert result.returncode == 126 and "write long text to a file in parts" in result.output
    assert (await sandbox.execute("echo '\ud800'", timeout=60)).output == "?\n"


@pytest.mark.parametrize("workdir", ["testbed", "/", "/usr/src", "/tmp/x", "/a/../b", "/home/agent"])
async def test_a_workdir_that_cannot_be_is_refused_with_a_remedy(provider: ProcessSandboxes, workdir: str) -> None:
    with pytest.raises(SandboxError, match=r"InvalidWorkdir.*such as /testbed"):
        await provider.create(SandboxRequest("bad", workdir=workdir), timeout=60)


async def test_a_workdir_may_lie_deep(provider: ProcessSandboxes) -> None:
    sandbox = await provider.create(SandboxRequest("deep", workdir="/srv/a/b", files={"f": "1"}, env={"X": "1"}), timeout=60)
    result = await sandbox.execute("pwd; cat /srv/a/b/f; echo $X$Y", timeout=60, env={"Y": "2"})
    assert result.output == "/srv/a/b\n112\n"


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, text=st.text(max_size=2000))
async def test_what_is_written_is_read_back(sandbox: ProcessSandbox, name: str, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    await sandbox.write({f"folder/{name}": text, f"/tmp/{name}": "other"})
    assert await sandbox.read(f"folder/{name}") == text.encode()
    assert await sandbox.read(f"/testbed/folder/{name}", limit=5) == text.encode()[:5]
    assert await sandbox.read(f"/tmp/{name}") == b"other"


async def test_reading_what_is_no_file_is_none_and_never_hangs(sandbox: ProcessSandbox) -> None:
    await sandbox.execute("mkdir folder; mkfifo fifo; ln -s /dev/zero zero; head -c 3000000 /dev/zero > large", timeout=60)
    for path in ("missing", "folder", "fifo", "zero"):
        assert await sandbox.read(path) is None
    assert len(await sandbox.read("large") or b"") == 1 << 20


@given(chunks=st.lists(st.binary(max_size=300), max_size=40), limit=st.integers(1, 500))
def test_bounded_output_keeps_head_and_tail_and_counts_the_rest(chunks: list[bytes], limit: int) -> None:
    output, whole = BoundedOutput(limit), b"".join(chunks)
    for chunk in chunks:
        output.feed(chunk)
    head, tail = output.parts()
    assert output.total == len(whole) and len(head) + len(tail) + output.dropped == len(whole)
    assert whole.startswith(head) and whole.endswith(tail)
    assert len(head) + len(tail) == min(limit, len(whole))
    assert (f"[{output.dropped} bytes left out]" in output.text()) == (output.dropped > 0)
