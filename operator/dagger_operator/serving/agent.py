"""Container `agent` of a serving pod: the reverse proxy in front of vLLM, which keeps vLLM on the version that should be served."""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import asyncio
import sys
from pathlib import Path

import structlog
from aiohttp import web

from dagger_operator.api import Role
from dagger_operator.api.ports import AGENT_PORT
from dagger_operator.serving.engine import Engine
from dagger_operator.serving.gate import Gate
from dagger_operator.serving.metrics import AgentMetrics
from dagger_operator.serving.proxy import Proxy
from dagger_operator.serving.replica import Replica, Weights, converge
from dagger_operator.serving.shared import Shared
from dagger_operator.serving.weights import role
from dagger_operator.store.policies import PolicyManifest, load_policy, pointed
from dagger_operator.store.stage import Stage, main

_LOOK_SECONDS = 1.0
"""Interval between checks of the pointer and of vLLM."""

log = structlog.get_logger()


async def serve(stage: Stage) -> None:
    """Run until cancelled. Listens on `POD_IP`, port `AGENT_PORT`."""
    spec = stage.run.spec
    student = role(stage) is Role.STUDENT
    serving = spec.student.served if student else spec.teacher.serving
    slow_seconds = float(serving.startup_deadline_seconds) if serving else 600.0
    shared, gate = Shared.of(stage), Gate()
    metrics = AgentMetrics(gate)
    engine = Engine(shared.socket, slow_seconds=slow_seconds, repacks=serving is not None and serving.gpus == 0)

    async def wanted() -> str | None:
        pointer = await pointed(stage.store) if student else None
        return pointer.policy if pointer else None

    async def provide(version: str) -> Weights:
        return await _provided(stage, shared, version) if student else Weights(version, digest=version, tensors=frozenset())

    replica = Replica(engine, shared, gate, metrics, wanted=wanted, provide=provide, drain_seconds=slow_seconds)
    # A client that disconnects also cancels its request to vLLM, which then stops generating.
    runner = web.AppRunner(
        Proxy(engine, gate, replica, metrics).application(), access_log=None, handler_cancellation=True, shutdown_timeout=5
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, stage.environ.get("POD_IP") or "0.0.0.0", AGENT_PORT, backlog=1024).start()  # noqa: S104 - a pod's own address
        log.info("listening", port=AGENT_PORT)
        await converge(replica, seconds=_LOOK_SECONDS)
    finally:
        await runner.cleanup()
        await engine.close()


async def _provided(stage: Stage, shared: Shared, version: str) -> Weights:
    """Put a student's version into the shared folder. A complete one that is already there needs no storage."""
    folder = shared.folder(version)
    try:
        manifest = PolicyManifest.model_validate_json(await asyncio.to_thread(Path.read_bytes, folder / "manifest.json"))
    except (OSError, ValueError):
        manifest = await load_policy(stage.store, version, folder)
    tensors = frozenset(file.sha256 for name, file in manifest.files.items() if name.endswith(".safetensors"))
    return Weights(version, manifest.digest, tensors)


if __name__ == "__main__":
    sys.exit(main("agent", serve))
