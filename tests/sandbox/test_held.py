"""A pod's command is held before its first instruction: one that forks at once would take its children out of the hold for good."""

from typing import Any

import pytest

from dagger_operator.sandbox.interface import SandboxRequest
from fixtures.sandboxes import LIMITS

pytestmark = pytest.mark.heavy


async def test_a_command_is_held_from_its_first_instruction(helper: Any) -> None:
    sandbox = await helper.create(SandboxRequest("held"), timeout=60)
    look = "(cat /proc/self/oom_score_adj & wait); nice; ulimit -d"
    held = f"1000\n19\n{LIMITS.memory_mib << 10}\n"
    said = [(await sandbox.execute(look, timeout=60)).output for _ in range(40)]
    await sandbox.close()
    assert said == [held] * 40
