"""The runs given to the operator, and stand-ins for their workers: a stage's results are written to storage when its Job is created.

Each run serves its student, uses an endpoint as teacher, and stays in the rollouts of its first round.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config

from dagger_operator.api import API_VERSION, KIND, DAggerRun, load
from dagger_operator.cluster.client import Client
from dagger_operator.control import COMPONENT, RUN
from dagger_operator.kube.api import Api
from dagger_operator.kube.connection import session
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.progress import report
from dagger_operator.store.results import PreflightResult, PrepareResult, StageProgress, save_result

NAMESPACE = "scale"
PODS = 10
"""Per run, once its rollouts are in progress: the student's server and the workers."""
DONE = 10
"""Rollouts out of a hundred that each run has done when it stops progressing."""
_AT_ONCE = 16

Json = dict[str, Any]


class Runs:
    def __init__(self, client: Client, http: aiohttp.ClientSession, server: str, folder: Path) -> None:
        self._client, self._http, self._server, self._folder = client, http, server, folder
        self._runs: dict[str, DAggerRun] = {}
        self._threads = ThreadPoolExecutor(4)

    @classmethod
    @contextlib.asynccontextmanager
    async def at_work(cls, kubeconfig: Path, folder: Path) -> AsyncIterator["Runs"]:
        """Keep storage in `folder`; stand-in workers run while the context lasts."""
        settings = Configuration()
        await load_kube_config(config_file=str(kubeconfig), client_configuration=settings)
        async with session(settings) as http:
            runs = cls(Client(Api(settings, http)), http, settings.host, folder)
            working = asyncio.create_task(runs._work())
            try:
                yield runs
                if working.done():
                    working.result()
            finally:
                working.cancel()

    async def make(self, count: int) -> None:
        """Create runs as fast as the API server accepts them."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int) -> None:
            async with gate:
                made = await self._client.create(self._document(f"run-{number:04d}"))
                self._runs[made["metadata"]["name"]] = load(made)

        await asyncio.gather(*map(one, range(count)))

    @contextlib.asynccontextmanager
    async def gaining(self) -> AsyncIterator[None]:
        """While the context lasts, every run gains a percent every ten seconds."""
        task = asyncio.create_task(self._gain())
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()

    async def _gain(self) -> None:
        stores = [Store.open(run.spec.storage, threads=self._threads) for run in self._runs.values()]
        for done in range(DONE + 1, 100):
            began = time.monotonic()
            for store in stores:
                await report(store, 1, "rollout", 0, StageProgress(done=done, total=100, unit="rollouts", seconds=60.0))
                await asyncio.sleep(5 / len(stores))
            await asyncio.sleep(max(0.0, began + 10 - time.monotonic()))

    def _document(self, name: str) -> Json:
        spec = {
            "rounds": 3,
            "student": {"model": "student", "serving": {"gpus": 1}},
            "teacher": {"model": "teacher", "endpoint": {"url": "https://teacher.example/v1"}},
            "tasks": {"source": {"type": "JSONL", "uri": "tasks"}, "heldOut": {"source": {"type": "JSONL", "uri": "held-out"}}},
            "rollouts": {"workers": PODS - 1},
            "storage": {"url": f"file://{self._folder}/{name}"},
        }
        return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}

    async def _work(self) -> None:
        """Watch for Jobs, and write the results of each one's stage."""
        query = {"watch": "1", "labelSelector": COMPONENT}
        address = f"{self._server}/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
        async with self._http.get(address, params=query, timeout=aiohttp.ClientTimeout(None), read_bufsize=1 << 22) as events:
            async for line in events.content:
                event = json.loads(line)
                labels = event["object"]["metadata"]["labels"]
                if event["type"] == "ADDED":
                    await self._leave(labels[RUN], labels[COMPONENT])

    async def _leave(self, name: str, stage: str) -> None:
        run = self._runs[name]
        store = Store.open(run.spec.storage, threads=self._threads)
        match stage:
            case "prepare":
                await take_prefix(store, run)
                await save_result(store, 0, PrepareResult(policy="r000-base", teacher="endpoint"))
            case "preflight":
                await save_result(store, 0, PreflightResult(student="r000-base", teacher="endpoint", checks={}))
            case "rollout":
                for index in range(PODS - 1):
                    await report(store, 1, stage, index, StageProgress(done=DONE, total=100, unit="rollouts", seconds=60.0))
