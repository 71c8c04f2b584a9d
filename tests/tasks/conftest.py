from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dagger_operator.api import SandboxLimits, Storage
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.store.objects import Store


@pytest.fixture
async def provider(tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    limits = SandboxLimits(memory_mib=512, disk_mib=128, processes=64, output_kib=64)
    async with ProcessSandboxes(limits, tmp_path / "sandboxes") as provider:
        yield provider


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(Storage(url=f"file://{tmp_path}/store"))
