"""When a sandbox pod counts as ready: as soon as its helper listens, or when the kubelet says so where the network does not let us see."""

import asyncio
import socket
from typing import Any

import pytest

from dagger_operator.api import SandboxLimits
from dagger_operator.sandbox import helper_line, pods
from dagger_operator.sandbox.helper_line import HelperLine, Routes, Severed
from dagger_operator.sandbox.interface import SandboxError
from dagger_operator.sandbox.pod_fleet import Life
from dagger_operator.sandbox.pod_manifest import Setting
from dagger_operator.sandbox.pod_state import PodState, Stand
from dagger_operator.sandbox.pods import PodSandboxes

HERE, NOBODY = "127.0.0.1", "127.254.254.254"


@pytest.fixture
def provider() -> PodSandboxes:
    return PodSandboxes(
        Setting("r", "team", "rollout-0", "0a1b2c3d", "worker:1", SandboxLimits(), 900, "task:1"), "sandboxes", most_alive=1
    )


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind((HERE, 0))
        monkeypatch.setattr(pods, "HELPER_PORT", free.getsockname()[1])
        return int(free.getsockname()[1])


async def test_a_sandbox_is_ready_once_its_helper_listens_before_the_kubelet_says_so(provider: PodSandboxes, port: int) -> None:
    life = Life({"metadata": {"name": "p", "uid": "u"}})
    answering = asyncio.create_task(provider._answering(life))
    life.see(PodState(Stand.COMING, "", "", HERE))
    await asyncio.sleep(0.3)
    assert not answering.done()
    async with await asyncio.start_server(lambda reader, writer: writer.close(), HERE, port):
        assert await asyncio.wait_for(answering, 10) == HERE


@pytest.mark.parametrize("closed", [False, True], ids=["nobody knew", "known"])
async def test_where_the_network_is_closed_the_kubelets_word_counts(provider: PodSandboxes, port: int, closed: bool) -> None:
    if closed:
        provider._routes.found_closed("the test says so")
    life = Life({"metadata": {"name": "p", "uid": "u"}})
    answering = asyncio.create_task(provider._answering(life))
    life.see(PodState(Stand.COMING, "", "", NOBODY))
    await asyncio.sleep(0.3)
    assert not answering.done()
    life.see(PodState(Stand.READY, "", "", NOBODY))
    assert await asyncio.wait_for(answering, 10) == NOBODY


async def test_a_pod_that_ends_before_its_helper_listens_says_why(provider: PodSandboxes, port: int) -> None:
    life: Any = Life({"metadata": {"name": "p", "uid": "u"}})
    answering = asyncio.create_task(provider._answering(life))
    life.see(PodState(Stand.COMING, "", "", HERE))
    await asyncio.sleep(0.1)
    life.see(PodState(Stand.ENDED, "OOMKilled", "of container helper"))
    with pytest.raises(SandboxError, match="OOMKilled"):
        await asyncio.wait_for(answering, 10)


class Way:
    """One that may be cut."""

    def __init__(self, *, cut: bool) -> None:
        self.cut, self.asked = cut, 0

    async def ask(self, method: str, path: str, body: bytes, timeout: float) -> tuple[int, bytes]:
        self.asked += 1
        if self.cut:
            raise Severed("cut")
        return 200, b""

    async def close(self) -> None:
        pass


async def test_a_network_that_was_closed_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_line, "_SWITCH_SECONDS", 0.05)
    network, through_exec, routes = Way(cut=True), Way(cut=False), Routes(seconds=0.5)
    await HelperLine("first", network, through_exec, routes).ask("GET", "/", timeout=1)
    assert routes.network_closed and through_exec.asked == 1
    tries, network.cut = network.asked, False
    await HelperLine("second", network, through_exec, routes).ask("GET", "/", timeout=1)
    assert (network.asked, through_exec.asked) == (tries, 2), "what the first one found out spares the second one the wait"
    await asyncio.sleep(0.6)
    await HelperLine("third", network, through_exec, routes).ask("GET", "/", timeout=1)
    assert (network.asked, through_exec.asked) == (tries + 1, 2)
