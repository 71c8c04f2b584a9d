"""Sandboxes to test: of processes, of the pods' helper alone, and of pods on the test cluster."""

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dagger_operator.sandbox.interface import Sandbox, SandboxProvider, SandboxRequest
from dagger_operator.sandbox.isolation import Isolation, probe
from dagger_operator.sandbox.pods import PodSandboxes
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox
from fixtures.helpers import HelperAlone, HelperInGvisor
from fixtures.sandboxes import LIMITS, Nap
from fixtures.tools import built


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
    async with ProcessSandboxes(LIMITS, tmp_path / "plain", allow_unconfined=True, isolation=isolation) as provider:
        yield provider


@pytest.fixture
def nap() -> Nap:
    return Nap()


@pytest.fixture
async def helper(sandboxd: Path) -> AsyncIterator[HelperAlone]:
    if not probe().bubblewrap:
        pytest.skip(f"no namespaces here: {probe().reason}")
    async with HelperAlone(sandboxd, LIMITS) as provider:
        yield provider


@pytest.fixture(params=["linux", "gvisor"])
async def any_helper(request: pytest.FixtureRequest, sandboxd: Path, tmp_path: Path) -> AsyncIterator[HelperAlone]:
    """Under either of the kernels that pods have."""
    if request.param == "gvisor" and os.geteuid() != 0:
        pytest.skip("gVisor wants root here")
    helper = HelperAlone(sandboxd, LIMITS) if request.param == "linux" else HelperInGvisor(sandboxd, LIMITS, built("gvisor"), tmp_path)
    async with helper:
        yield helper


BACKENDS = ("process", pytest.param("helper", marks=pytest.mark.heavy), pytest.param("pod", marks=pytest.mark.heavy))


@pytest.fixture(params=BACKENDS)
async def any_provider(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SandboxProvider]:
    """What every kind of sandbox promises is tested on each."""
    if request.param == "process":
        if not _ISOLATIONS:
            pytest.skip(f"no namespaces here: {probe().reason}")
        async with ProcessSandboxes(LIMITS, tmp_path / "sandboxes", isolation=next(iter(_ISOLATIONS.values()))) as processes:
            yield processes
    elif request.param == "helper":
        async with HelperAlone(request.getfixturevalue("sandboxd"), LIMITS) as helper:
            yield helper
    else:
        make: Callable[..., PodSandboxes] = request.getfixturevalue("pods")
        async with make() as pods:
            yield pods


@pytest.fixture
async def any_sandbox(any_provider: SandboxProvider) -> AsyncIterator[Sandbox]:
    sandbox = await any_provider.create(SandboxRequest("one"), timeout=120)
    yield sandbox
    await sandbox.close()
