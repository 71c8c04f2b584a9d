"""A Deployment on this machine: as many pods as it has replicas, recreated when its template changes."""

import asyncio
from collections.abc import Callable
from typing import Any

from dagger_operator.local.pods import Pod


class DeploymentRunner:
    """Runs one Deployment (strategy Recreate). `make_pod(name, index)` builds a pod from the current template."""

    def __init__(self, manifest: dict[str, Any], make_pod: Callable[[str, int], Pod], changed: Callable[[], None]) -> None:
        self._manifest, self._make_pod, self._changed = manifest, make_pod, changed
        self._name: str = manifest["metadata"]["name"]
        self._pods: dict[int, Pod] = {}
        self._lives: dict[int, asyncio.Task[None]] = {}
        self._running: dict[str, Any] | None = None
        """The template that the pods were created from."""
        self._ready = 0
        self._progressed = asyncio.get_running_loop().time()
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._converge(), name=f"deployment {self._name}")
        self.update(manifest)

    def update(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        self._wanted.set()

    def manifest(self) -> dict[str, Any]:
        pods = [pod.manifest() for pod in self._pods.values()]
        ready = sum(condition["status"] == "True" for pod in pods for condition in pod["status"]["conditions"])
        current = self._running == self._manifest["spec"]["template"]
        status = {
            "replicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "updatedReplicas": len(pods) if current else 0,
            "conditions": self._conditions(ready),
        }
        return {**self._manifest, "status": status}

    def _conditions(self, ready: int) -> list[dict[str, str]]:
        """Return `Progressing`, which is False if no pod has become ready for longer than `progressDeadlineSeconds`."""
        time, spec = asyncio.get_running_loop().time(), self._manifest["spec"]
        wanted = int(spec.get("replicas", 1))
        if ready != self._ready or ready >= wanted:
            self._ready, self._progressed = ready, time
        deadline = float(spec.get("progressDeadlineSeconds", 600))
        if time - self._progressed <= deadline:
            return [{"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}]
        message = f"{ready} of {wanted} replicas became ready within progressDeadlineSeconds = {deadline:g}"
        return [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": message}]

    def pods(self) -> list[dict[str, Any]]:
        return [pod.manifest() for _, pod in sorted(self._pods.items())]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._scale_down(0)

    async def _converge(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            template, replicas = self._manifest["spec"]["template"], int(self._manifest["spec"].get("replicas", 1))
            if template != self._running:
                await self._scale_down(0)
                self._running, self._progressed = template, asyncio.get_running_loop().time()
            await self._scale_down(replicas)
            for index in range(len(self._pods), replicas):
                pod = self._pods[index] = self._make_pod(f"{self._name}-{index}", index)
                self._lives[index] = asyncio.create_task(pod.run(), name=f"pod {self._name}-{index}")
            self._changed()

    async def _scale_down(self, replicas: int) -> None:
        leaving = [index for index in self._pods if index >= replicas]
        for index in leaving:
            self._lives[index].cancel()
        await asyncio.gather(*(self._lives.pop(index) for index in leaving), return_exceptions=True)
        for index in leaving:
            del self._pods[index]
        if leaving:
            self._changed()
