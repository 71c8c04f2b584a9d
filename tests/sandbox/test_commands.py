"""What commands in a sandbox can do, and how they end."""

import asyncio
import gc
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.sandbox.command import BoundedOutput
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from dagger_operator.sandbox.usage import Paced
from fixtures.sandboxes import Nap


async def test_the_usual_tools_work(sandbox: ProcessSandbox) -> None:
    code = "import json, sqlite3; print(6 * 7)"
    command = "printf 'a\\nb\\n' > f && sed -i s/b/c/ f && grep c f && git init -q . && git add f && id -un"
    result = await sandbox.execute(f"{command} && python3 -c '{code}'", timeout=60)
    assert (result.output, result.returncode) == ("c\nagent\n42\n", 0)


async def test_cancelling_again_and_again_leaves_no_process_behind(sandbox: ProcessSandbox, nap: Nap) -> None:
    for delay in (0.0, 0.001, 0.005, 0.02, 0.1):
        task = asyncio.create_task(sandbox.execute(str(nap), timeout=600))
        await asyncio.sleep(delay)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        assert task.cancelled() and nap.alive == 0
    gc.collect()  # a process that nobody waited for warns here, and a warning is an error


def states(pids: list[int]) -> set[str]:
    """Of processes that are there: R, S, and so on; Z where nothing is left but an entry."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            found.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return found


async def test_nothing_of_a_command_lives_any_more_when_its_end_is_told(sandbox: ProcessSandbox, nap: Nap) -> None:
    for _ in range(2):
        many = f"for i in $(seq 40); do (setsid nohup {nap} >/dev/null 2>&1 &); done; {nap}"
        running = asyncio.create_task(sandbox.execute(many, timeout=2))
        while len(pids := nap.pids) < 41 and not running.done():
            await asyncio.sleep(0.05)
        assert (await running).timed_out
        assert states(pids) <= {"Z", "X"}


async def test_closing_ends_what_runs_removes_everything_and_may_be_done_twice(
    provider: ProcessSandboxes, tmp_path: Path, nap: Nap
) -> None:
    sandbox = await provider.create(SandboxRequest("two", files={"f": "x"}), timeout=60)
    running = asyncio.create_task(sandbox.execute(str(nap), timeout=600))
    while not nap.alive:
        await asyncio.sleep(0.02)
    await asyncio.gather(sandbox.close(), sandbox.close())
    with pytest.raises(SandboxError, match="Closed"):
        await running
    assert nap.alive == 0
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


@pytest.mark.parametrize("workdir", ["testbed", "/", "/usr/src", "/tmp/x", "/a/../b", "/home/agent"])
async def test_a_workdir_that_cannot_be_is_refused_with_a_remedy(provider: ProcessSandboxes, workdir: str) -> None:
    with pytest.raises(SandboxError, match=r"InvalidWorkdir.*such as /testbed"):
        await provider.create(SandboxRequest("bad", workdir=workdir), timeout=60)


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


async def test_a_command_is_looked_at_however_busy_the_threads_of_the_worker_are() -> None:
    loop, busy = asyncio.get_running_loop(), threading.Event()
    waiting = [loop.run_in_executor(None, busy.wait) for _ in range(64)]
    try:
        paced = Paced(0.0, 0)
        assert await asyncio.wait_for(paced.look(lambda: 1), 10) == 1
        await asyncio.sleep(0.1)
        assert await asyncio.wait_for(paced.look(lambda: 2), 10) == 2, "to wait for a thread is not to look"
    finally:
        busy.set()
        await asyncio.gather(*waiting)
