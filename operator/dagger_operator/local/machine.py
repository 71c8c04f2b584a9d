"""This machine as a very small cluster: accepts objects, runs them, and shows them with their status."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dagger_operator.local.addresses import pod_address
from dagger_operator.local.containers import now
from dagger_operator.local.deployments import DeploymentRunner
from dagger_operator.local.environment import COMPLETION_INDEX, PodContext, host_names
from dagger_operator.local.guard import Guard
from dagger_operator.local.jobs import JobRunner
from dagger_operator.local.pods import Pod
from dagger_operator.local.processes import Reach, reap

Manifest = dict[str, Any]
Key = tuple[str, str]
"""Kind and name."""


class Runner(Protocol):
    """Runs one workload object."""

    def update(self, manifest: Manifest) -> None: ...

    def manifest(self) -> Manifest: ...

    def pods(self) -> list[Manifest]: ...

    async def close(self) -> None: ...


_RUNNERS: dict[str, Callable[[Manifest, Callable[[str, int], Pod], Callable[[], None]], Runner]] = {
    "Deployment": DeploymentRunner,
    "Job": JobRunner,
}


@dataclass(frozen=True)
class Place:
    """Where one run's processes live on this machine."""

    scope: str
    """Unique to the run: marks its processes, and determines its pods' addresses."""
    folder: Path
    """Volumes of pods; a short path, since it becomes part of Unix socket paths."""
    logs: Path
    """Output of containers, kept: `<pod>/<container>.log`."""
    environment: Mapping[str, str]
    """What every process gets in addition to its manifest's variables."""
    secrets: Mapping[str, Mapping[str, str]]


class Machine:
    """The objects of one run. Use as an async context manager: on leaving, nothing of the run is left running."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._objects: dict[Key, Manifest] = {}
        self._runners: dict[Key, Runner] = {}
        self._leaving: dict[Key, asyncio.Task[None]] = {}
        self._reach = Reach(self._mark, place.logs)
        self._guard = Guard(self._reach)
        self.changed = asyncio.Event()
        """Set whenever an object or a pod has changed."""

    async def __aenter__(self) -> "Machine":
        # An earlier supervisor and its guard may have been killed before they could stop what the supervisor had started.
        await asyncio.to_thread(reap, self._reach)
        await self._guard.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        for key in list(self._runners):
            self.remove(*key)
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
        await asyncio.to_thread(reap, self._reach)
        await self._guard.__aexit__(*error)

    def apply(self, objects: Iterable[Manifest]) -> None:
        """Create or update objects; skips an object that is still being removed."""
        workloads = []
        for manifest in objects:
            key = (manifest["kind"], manifest["metadata"]["name"])
            if key in self._leaving or self._objects.get(key) == manifest:
                continue
            self._objects[key] = manifest
            if manifest["kind"] in _RUNNERS:
                workloads.append((key, manifest))
        for key, manifest in workloads:  # after all Services are known
            if key in self._runners:
                self._runners[key].update(manifest)
            else:
                self._runners[key] = _RUNNERS[manifest["kind"]](manifest, self._pod_maker(key), self.changed.set)

    def remove(self, kind: str, name: str) -> None:
        """Remove an object; it is shown until its last process is gone."""
        key = (kind, name)
        if key in self._leaving or key not in self._objects:
            return
        if key in self._runners:
            self._leaving[key] = asyncio.create_task(self._close(key))
        else:
            del self._objects[key]

    def observed(self) -> list[tuple[Manifest, list[Manifest]]]:
        """Return every object with its status, and its pods."""
        found = []
        for key, manifest in self._objects.items():
            runner = self._runners.get(key)
            found.append((runner.manifest(), runner.pods()) if runner else (manifest, []))
        return found

    async def _close(self, key: Key) -> None:
        await self._runners[key].close()
        del self._runners[key], self._objects[key], self._leaving[key]
        self.changed.set()

    @property
    def _mark(self) -> str:
        return f"{self._place.scope}/"

    def _pod_maker(self, key: Key) -> Callable[[str, int], Pod]:
        def make(name: str, index: int) -> Pod:
            owner = self._objects[key]
            template = owner["spec"]["template"]
            metadata = {**template.get("metadata", {}), "name": name, "namespace": owner["metadata"].get("namespace", "default")}
            metadata["creationTimestamp"] = now()
            indexed = owner["spec"].get("completionMode") == "Indexed"
            if indexed:
                metadata["labels"] = {**metadata.get("labels", {}), COMPLETION_INDEX: f"{index}"}
            context = PodContext(
                name=name,
                namespace=metadata["namespace"],
                address=pod_address(self._place.scope, name),
                folder=self._place.folder / name,
                labels=metadata.get("labels", {}),
                completion_index=index if indexed else None,
                secrets=self._place.secrets,
                hosts=self._hosts(),
            )
            manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
            mark, logs = f"{self._mark}{name}/", self._place.logs / name
            return Pod(manifest, context, self._place.environment, mark=mark, logs=logs, changed=self.changed.set)

        return make

    def _hosts(self) -> dict[str, tuple[str, ...]]:
        hosts: dict[str, tuple[str, ...]] = {}
        for (kind, name), service in self._objects.items():
            if kind == "Service":
                addresses = {pod: pod_address(self._place.scope, pod) for pod in self._pods_behind(service["spec"]["selector"])}
                hosts.update(host_names(name, service["metadata"].get("namespace", "default"), addresses))
        return hosts

    def _pods_behind(self, selector: Mapping[str, str]) -> list[str]:
        """Return the names of the pods that a Service selects, whether or not they are running yet."""
        names = []
        for (kind, name), owner in self._objects.items():
            if kind not in _RUNNERS:
                continue
            labels = owner["spec"]["template"].get("metadata", {}).get("labels", {})
            if selector.items() <= labels.items():
                count = owner["spec"].get("replicas", 1) if kind == "Deployment" else owner["spec"].get("completions", 1)
                names += [f"{name}-{index}" for index in range(count)]
        return names
