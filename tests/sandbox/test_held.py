"""A pod's command is held before its first instruction: one that forks at once would take its children out of the hold for good."""

from typing import Any

import pytest

from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from fixtures.sandboxes import LIMITS

pytestmark = pytest.mark.heavy


async def test_a_command_is_held_from_its_first_instruction(helper: Any) -> None:
    sandbox = await helper.create(SandboxRequest("held"), timeout=60)
    look = "(cat /proc/self/oom_score_adj & wait); nice; ulimit -d"
    held = f"1000\n19\n{LIMITS.memory_mib << 10}\n"
    said = [(await sandbox.execute(look, timeout=60)).output for _ in range(40)]
    await sandbox.close()
    assert said == [held] * 40


async def test_a_shell_that_cannot_be_started_is_no_result_of_a_command(helper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = helper._command
    path = ("--setenv", "PATH", "/tmp/first:/usr/bin")

    def command(request: SandboxRequest, token: str) -> list[str]:
        words: list[str] = plain(request, token)
        at = words.index("--clearenv") + 1
        return [*words[:at], *path, *words[at:]]

    monkeypatch.setattr(helper, "_command", command)
    sandbox = await helper.create(SandboxRequest("broken"), timeout=60)
    await sandbox.execute("mkdir /tmp/first; printf '\\177ELF' > /tmp/first/bash; chmod +x /tmp/first/bash", timeout=60)
    with pytest.raises(SandboxError, match="bash cannot be started: exec format error"):
        await sandbox.execute("true", timeout=60)
    await sandbox.close()
