"""A pod on this machine: init containers one after another, then the others in parallel."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from dagger_operator.local.containers import Container
from dagger_operator.local.environment import CannotStart, PodContext

BACK_OFF = (1.0, 60.0)
"""First and longest pause, in seconds, before a container that ended is restarted."""
SETTLED = 60.0
"""A life of this many seconds resets the pause to the first one."""


class Pod:
    """Runs a pod's manifest. `run` returns when all containers have ended for good; cancelling it stops them."""

    def __init__(
        self,
        manifest: Mapping[str, Any],
        context: PodContext,
        base: Mapping[str, str],
        *,
        mark: str,
        logs: Path,
        changed: Callable[[], None],
    ) -> None:
        spec = manifest["spec"]
        self._manifest, self._context, self._changed = manifest, context, changed
        self._restart: str = spec.get("restartPolicy", "Always")
        grace = float(spec.get("terminationGracePeriodSeconds", 30))

        def container(entry: Mapping[str, Any]) -> Container:
            return Container(entry, context, base, mark=mark, logs=logs, grace=grace, changed=changed)

        self._init = [container(entry) for entry in spec.get("initContainers", ())]
        self._containers = [container(entry) for entry in spec["containers"]]
        self._phase = "Pending"

    @property
    def succeeded(self) -> bool:
        return self._phase == "Succeeded"

    @property
    def failed(self) -> bool:
        return self._phase == "Failed"

    def exit_codes(self) -> dict[str, int]:
        """Return exit codes by container, for those that ended."""
        every = (*self._init, *self._containers)
        return {c.name: c.state["terminated"]["exitCode"] for c in every if "terminated" in c.state}

    def manifest(self) -> dict[str, Any]:
        """Return the pod as an API server would show it."""
        ready = self._phase == "Running" and all(container.ready for container in self._containers)
        return {
            **self._manifest,
            "status": {
                "phase": self._phase,
                "podIP": self._context.address,
                "conditions": [{"type": "Ready", "status": str(ready)}],
                "initContainerStatuses": [container.status() for container in self._init],
                "containerStatuses": [container.status() for container in self._containers],
            },
        }

    async def run(self) -> None:
        """Run until every container has ended for good, or forever if the restart policy is Always."""
        try:
            for container in self._init:
                if not await self._until_done(container, again=self._restart != "Never"):
                    self._say("Failed")
                    return
            self._say("Running")
            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(self._keep(container)) for container in self._containers]
            self._say("Succeeded" if all(life.result() for life in lives) else "Failed")
        finally:
            await asyncio.to_thread(shutil.rmtree, self._context.folder, ignore_errors=True)

    def _say(self, phase: str) -> None:
        self._phase = phase
        self._changed()

    async def _keep(self, container: Container) -> bool:
        if self._restart == "Always":
            await self._for_ever(container)
        return await self._until_done(container, again=self._restart == "OnFailure")

    async def _until_done(self, container: Container, *, again: bool) -> bool:
        """Run until exit code 0, or only once without `again`; return whether it exited with 0."""
        pause = BACK_OFF[0]
        while True:
            code = await self._life(container)
            if code == 0 or not again:
                return code == 0
            pause = await self._pause(container, pause)

    async def _for_ever(self, container: Container) -> NoReturn:
        loop, pause = asyncio.get_running_loop(), BACK_OFF[0]
        while True:
            started = loop.time()
            await self._life(container)
            if loop.time() - started > SETTLED:
                pause = BACK_OFF[0]
            pause = await self._pause(container, pause)

    async def _pause(self, container: Container, pause: float) -> float:
        ended = container.state.get("terminated", {})
        container.waits("CrashLoopBackOff", f"ended with {ended.get('exitCode')}: {ended.get('message', '')}".rstrip(": "))
        await asyncio.sleep(pause)
        return min(2 * pause, BACK_OFF[1])

    async def _life(self, container: Container) -> int:
        """Run one life; a container that cannot be started waits forever, as on a cluster, and reports why."""
        while True:
            try:
                return await container.live()
            except CannotStart:
                await asyncio.sleep(5)
