"""A pod's command is held before its first instruction: one that forks at once would take its children out of the hold for good."""

from pathlib import Path
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


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A bash that is none."""
    (tmp_path / "bash").write_text("\177ELF")
    (tmp_path / "bash").chmod(0o755)
    return str(tmp_path / "bash")


def with_options(helper: Any, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Gives the helper's container more than it has; PATH begins with a folder of its own."""
    plain = helper._command

    def command(request: SandboxRequest, token: str) -> list[str]:
        words: list[str] = plain(request, token)
        at = words.index("--clearenv") + 1
        return [*words[:at], *options, "--setenv", "PATH", "/tmp/first:/usr/bin", *words[at:]]

    monkeypatch.setattr(helper, "_command", command)


async def test_a_shell_that_never_started_is_the_sandboxs_fault(helper: Any, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    with_options(helper, monkeypatch, "--ro-bind", broken, "/tmp/first/bash")
    sandbox = await helper.create(SandboxRequest("broken"), timeout=60)
    for _ in range(2):
        with pytest.raises(SandboxError, match=r"bash cannot be started: .*exec format error"):
            await sandbox.execute("true", timeout=60)
    await sandbox.close()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            "mkdir /tmp/first; printf '\\177ELF' > /tmp/first/bash; chmod +x /tmp/first/bash",
            "bash cannot be started: execve: exec format error",
        ),
        ("rmdir $PWD; touch $PWD", "the working directory: mkdir /testbed: not a directory"),
    ],
)
async def test_a_shell_that_commands_spoilt_is_their_result(helper: Any, monkeypatch: pytest.MonkeyPatch, spoil: str, says: str) -> None:
    with_options(helper, monkeypatch)
    sandbox = await helper.create(SandboxRequest("spoilt"), timeout=60)
    assert (await sandbox.execute(spoil, timeout=60)).returncode == 0
    for _ in range(2):
        result = await sandbox.execute("true", timeout=60)
        assert result.returncode == 126 and says in result.output
    await sandbox.close()
