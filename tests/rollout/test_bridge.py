"""An agent in a thread calls the loop, and ends when the worker is done with it."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dagger_operator.rollout.bridge import Bridge, in_thread


async def answer(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def test_an_agent_gets_what_the_loop_answers_and_what_it_raises() -> None:
    async def fail() -> None:
        raise LookupError("gone")

    def agent(bridge: Bridge) -> int:
        with pytest.raises(LookupError, match="gone"):
            bridge.call(fail())
        return bridge.call(answer(1)) + bridge.call(answer(2))

    with ThreadPoolExecutor(1) as executor:
        assert await in_thread(executor, agent) == 3


async def test_a_cancelled_agent_leaves_neither_its_thread_nor_its_call() -> None:
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def stubborn(bridge: Bridge) -> None:
        while True:
            try:
                bridge.call(hang())
            except Exception:
                continue

    with ThreadPoolExecutor(1) as executor:
        running = asyncio.create_task(in_thread(executor, stubborn))
        await waiting.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.wait_for(cancelled.wait(), 30)
        # The only thread is free again: another agent gets it.
        assert await asyncio.wait_for(in_thread(executor, lambda bridge: bridge.call(answer(7))), 30) == 7
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name and thread.is_alive()]
