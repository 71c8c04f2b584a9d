"""Whether this process makes progress, and whether it does its job, for the kubelet.

`/livez` measures progress: a process whose watches, queue or Lease are stuck has to be restarted. `/readyz` says whether it does its job: a
standby is ready, it waits.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from dagger_operator.cluster.streams import Streams

LONGEST_SILENCE = 600.0
"""Seconds. Every watch is reopened within 240 s; one that is not is dead. Before it is first opened its list is read, which takes seconds
for ten thousand objects."""
LONGEST_STANDSTILL = 300.0
"""Seconds that runs may wait while none is finished."""
LONGEST_LOOK = 1800.0
"""Seconds that one reconcile may take. Each of its requests ends within 30 s, and reads of storage sooner."""


@dataclass
class Health:
    streams: Streams
    standstill: Callable[[], float]
    """Seconds for which runs have waited while none was finished."""
    look: Callable[[], float]
    """Seconds for which the longest reconcile in progress has taken."""
    leads: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    lag: float = field(default=0.0)
    """Seconds by which the event loop was late at the last measurement. Only a metric: a loop that is late by more than the kubelet's
    patience answers no probe in time."""

    def stuck(self) -> str | None:
        """Return why this process should be restarted."""
        if (silence := self.streams.silence) > LONGEST_SILENCE:
            return f"a watch gave no sign of life for {silence:.0f} s"
        if (standstill := self.standstill()) > LONGEST_STANDSTILL:
            return f"runs have waited for {standstill:.0f} s while none was finished"
        if (look := self.look()) > LONGEST_LOOK:
            return f"a run has been looked at for {look:.0f} s"
        return None

    def idle(self) -> str | None:
        """Return why this process does not do its job yet."""
        if self.leads() and (waiting := self.streams.waiting):
            return f"not watching yet: {', '.join(waiting)}"
        return self.stuck()

    async def watch_the_loop(self, every: float = 1.0) -> None:
        """Measure forever how late the event loop is."""
        while True:
            due = self.clock() + every
            await asyncio.sleep(every)
            self.lag = max(0.0, self.clock() - due)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/livez", self._answer(self.stuck)), web.get("/readyz", self._answer(self.idle))]

    def _answer(self, trouble: Callable[[], str | None]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            said = trouble()
            standby = "" if self.leads() else " (standby)"
            return web.Response(status=503, text=said) if said else web.Response(text=f"ok{standby}")

        return answer
