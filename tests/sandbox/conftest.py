from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox.interface import SandboxRequest
from dagger_operator.sandbox.isolation import Isolation, probe
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox

LIMITS = SandboxLimits(memory_mib=256, disk_mib=24, processes=48, output_kib=64)


def isolations() -> dict[str, Isolation]:
    """Every way in which this machine can hold sandboxes with namespaces."""
    best = probe()
    if not best.bubblewrap:
        return {}
    found = {"sampling": probe(cgroups=False)}
    return {"cgroups": best, **found} if best.cgroups else found


_ISOLATIONS = isolations()


@pytest.fixture
async def provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    """The best that this machine has; tests of limits ask for each way by name."""
    if not _ISOLATIONS:
        pytest.skip(f"no namespaces here: {probe().reason}")
    name = getattr(request, "param", next(iter(_ISOLATIONS)))
    if name not in _ISOLATIONS:
        pytest.skip("control groups cannot be made here")
    async with ProcessSandboxes(LIMITS, tmp_path / "sandboxes", isolation=_ISOLATIONS[name]) as provider:
        yield provider


@pytest.fixture
async def sandbox(provider: ProcessSandboxes) -> ProcessSandbox:
    return await provider.create(SandboxRequest("one"), timeout=60)


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[ProcessSandboxes]:
    isolation = Isolation(bubblewrap=None, reason="the test forbids it", cgroups=None, root=probe().root)
    async with ProcessSandboxes(LIMITS, tmp_path / "plain", isolation=isolation) as provider:
        yield provider


@pytest.fixture
def alive() -> Callable[[str], int]:
    """How many processes of the machine carry a mark in their command line."""

    def count(mark: str) -> int:
        return sum(1 for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ()))

    return count
