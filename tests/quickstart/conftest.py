"""The example is a folder of scripts; tests import them as its own `run.py` does."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.process import ProcessSandboxes

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))


@pytest.fixture
def quickstart() -> Path:
    return QUICKSTART


@pytest.fixture
async def sandboxes(tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    async with ProcessSandboxes(SandboxLimits(memory_mib=512, processes=64, disk_mib=64), tmp_path / "sandboxes") as provider:
        yield provider
