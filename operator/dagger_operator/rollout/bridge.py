"""How an agent running in a thread calls the worker's event loop, and how the worker stops it."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class BridgeClosed(BaseException):
    """The worker is done with this agent. Not an `Exception`, so that the agent's own handlers do not swallow it."""


class Bridge:
    """Calls from one agent's thread into the event loop; create it inside the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._under_way: Future[Any] | None = None

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it; raises what it raises, or `BridgeClosed`."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise BridgeClosed
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._under_way = future
        try:
            return future.result()
        except CancelledError:
            raise BridgeClosed from None

    def close(self) -> None:
        """Cancel the call in progress; the thread ends there, or at its next call."""
        with self._lock:
            self._closed = True
            if self._under_way is not None:
                self._under_way.cancel()


async def in_thread(executor: Executor, agent: Callable[[Bridge], T]) -> T:
    """Run an agent in a thread of the executor. If cancelled, the thread does not continue working."""
    bridge = Bridge()
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, agent, bridge)
    finally:
        bridge.close()
