"""A machine of its own for each test, with short manifests to run on it."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.local.machine import Machine, Manifest, Place


class Lab:
    """A machine, and what tests ask of it."""

    def __init__(self, machine: Machine, place: Place) -> None:
        self.machine, self.place = machine, place

    def container(self, code: str, *, name: str = "main", **more: Any) -> dict[str, Any]:
        return {"name": name, "command": ["python", "-c", code], **more}

    def job(
        self, name: str, code: str, *, container: dict[str, Any] | None = None, pod: dict[str, Any] | None = None, **spec: Any
    ) -> Manifest:
        containers = [self.container(code, **(container or {}))]
        template = {"metadata": {"labels": {"job": name}}, "spec": {"restartPolicy": "Never", "containers": containers, **(pod or {})}}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": template, **spec}}

    def deployment(self, name: str, *containers: dict[str, Any], replicas: int = 1, **pod: Any) -> Manifest:
        spec = {"terminationGracePeriodSeconds": 2, "containers": list(containers), **pod}
        template = {"metadata": {"labels": {"app": name}}, "spec": spec}
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {"replicas": replicas, "template": template},
        }

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.05)

    def status(self, name: str) -> dict[str, Any]:
        return next(manifest["status"] for manifest, _ in self.machine.observed() if manifest["metadata"]["name"] == name)

    def pods(self, name: str) -> list[Manifest]:
        return next((pods for manifest, pods in self.machine.observed() if pods and manifest["metadata"]["name"] == name), [])

    def container_state(self, name: str, container: str = "main") -> dict[str, Any]:
        """Its entry of `containerStatuses`; empty in all its parts while there is no pod yet."""
        found = (c for pod in self.pods(name) for c in pod["status"]["containerStatuses"] if c["name"] == container)
        return next(found, {"state": {}, "restartCount": 0})

    def end(self, name: str) -> tuple[str, str] | None:
        """Type and reason of the condition that ended a Job."""
        return next(((c["type"], c["reason"]) for c in self.status(name)["conditions"] if c["type"] != "Suspended"), None)

    def log(self, pod: str, container: str = "main") -> str:
        path = self.place.logs / pod / f"{container}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    place = Place(
        scope=uuid.uuid4().hex,
        folder=tmp_path / "pods",
        logs=tmp_path / "logs",
        environment={"PATH": os.environ["PATH"]},
        secrets={"key": {"token": "s3cret"}},
    )
    async with Machine(place) as machine:
        yield Lab(machine, place)
