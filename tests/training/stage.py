"""A run's training stage on this machine, for tests: started, killed, and read; and vLLM for what it made."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from dagger_operator.api import Storage
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import close_round
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import save_policy
from dagger_operator.store.records import Trajectory
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result, save_result
from dagger_operator.store.trajectories import write_trajectory

STEPS = 150
TRAINING = {
    "steps": {"type": "Constant", "value": STEPS},
    "batchSize": 6,
    "batchUnit": "Labels",
    "microBatchTokens": 400,
    "learningRate": 3e-3,
    "precision": "FP32",
    "processesPerNode": 2,
    "gpusPerNode": 0,
    "checkpointEverySteps": 3,
}


class Setting:
    """A run's storage prefix on this machine, and its training stage."""

    def __init__(self, folder: Path, **training: Any) -> None:
        self.folder = folder
        spec = {
            "student": {"model": "tiny"},
            "teacher": {"model": "t", "endpoint": {"url": "http://127.0.0.1:1/v1"}},
            "tasks": {
                "source": {"type": "JSONL", "uri": "tasks.jsonl"},
                "heldOut": {"source": {"type": "JSONL", "uri": "held-out.jsonl"}},
            },
            "storage": {"url": f"file://{folder}/store"},
            "seed": 5,
            "training": {**TRAINING, **training},
        }
        self.run = {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": {"name": "demo"}, "spec": spec}
        self.store = Store.open(Storage(url=spec["storage"]["url"]))
        self.log = folder / "stage.log"
        self.last_words = folder / "last-words.json"

    async def prepare(self, weights: Path, trajectories: list[Trajectory]) -> None:
        made = await save_policy(self.store, weights, round=0, base_model="tiny", parent=None, data_digest=None, settings={}, software={})
        await save_result(self.store, 0, PrepareResult(policy=made.version, teacher="t"))
        for trajectory in trajectories:
            await write_trajectory(self.store, Kind.ROLLOUT, trajectory)
        await close_round(self.store, "demo", 1, [trajectory.rollout_id for trajectory in trajectories])

    @contextmanager
    def started(self, module: str = "dagger_operator.training", **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """The stage, or a module of it, with `more` in its environment, as a process group of its own; nothing of it is left afterwards."""
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)  # lost with the pod
        environ = {
            **os.environ,
            "DAGGER_RUN": json.dumps(self.run),
            "DAGGER_ROUND": "1",
            "DAGGER_SCRATCH": str(self.folder / "scratch"),
            "DAGGER_TERMINATION_LOG": str(self.last_words),
            **more,
        }
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", module]
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @contextmanager
    def two_nodes(self, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """A pod on each of two nodes, on which nothing is left of pods before."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master = {"DAGGER_MASTER_ADDR": "127.0.0.1", "DAGGER_MASTER_PORT": f"{probe.getsockname()[1]}", "GLOO_SOCKET_IFNAME": "lo"}
        with ExitStack() as stack:
            nodes = [{"JOB_COMPLETION_INDEX": f"{index}", "DAGGER_SCRATCH": f"{folder / str(index)}"} for index in range(2)]
            yield [stack.enter_context(self.started(**master, **node)) for node in nodes]

    async def ended(self) -> int:
        with self.started() as process:
            return await asyncio.to_thread(process.wait, 600)

    async def result(self) -> TrainingResult:
        found = await read_result(self.store, 1, TrainingResult)
        assert found is not None, self.log.read_text()[-4000:]
        return found

    def seldom(self) -> None:
        """From now on checkpoints are rare: nobody kills it any more."""
        self.run["spec"]["training"]["checkpointEverySteps"] = 50

    def failure(self) -> dict[str, str]:
        words: dict[str, str] = json.loads(self.last_words.read_text())
        return words

    async def checkpoints(self) -> list[str]:
        """Manifests of whole checkpoints, oldest first."""
        keys = [info.key for info in await self.store.list(layout.checkpoint_prefix(1))]
        return [key for key in keys if key.endswith("manifest.json")]


async def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert process.poll() is None, "the stage ended before what was waited for"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@contextmanager
def vllm(log_file: Path, weights: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of these weights, and its URL; it may not be ready yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dagger_operator.serving.cpu_server", "--model", weights, *options]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"]
    # One process, as `control.vllm` has it.
    command += ["--distributed-executor-backend", "uni"]
    environ = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        await asyncio.sleep(0.5)
        return False
