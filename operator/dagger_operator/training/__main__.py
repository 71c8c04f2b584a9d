"""The training stage: `python -m dagger_operator.training`. Starts this pod's ranks and reports how they end.

It does not import torch. The ranks are started directly, with the environment variables that torchrun would set: torch's launcher costs
seconds and would sit between a signal and the ranks.
"""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from dagger_operator.api.training import Offload
from dagger_operator.store.policies import load_adapter, load_policy
from dagger_operator.store.results import TrainingResult, read_result
from dagger_operator.store.stage import ExitCode, Stage, StageFailure, main
from dagger_operator.training.inputs import adapter_folder, inputs, weights_folder
from dagger_operator.training.peers import PEER_LOST

_GRACE_SECONDS = 10
"""How long the other ranks may keep running after one failed: they wait for it in a collective that will never complete."""


@dataclass(frozen=True)
class RankProcess:
    rank: int
    process: asyncio.subprocess.Process
    last_words: Path
    """Where the rank records why it failed, as a pod does in its termination log."""


async def body(stage: Stage) -> None:
    if await read_result(stage.store, stage.round, TrainingResult) is not None:
        structlog.get_logger().info("already done")
        return
    given = await inputs(stage)
    await load_policy(stage.store, given.base, weights_folder(stage.scratch, given.base))
    if given.adapted and not await load_adapter(stage.store, given.parent, adapter_folder(stage.scratch, given.parent)):
        raise StageFailure(
            "NoAdapter",
            f"{given.parent}, the student of the round before, has no adapter, so training.lora cannot go on from it: training.lora may "
            "not change in a run; make a new run with a new name",
        )
    master = _master(stage)
    ranks = [await _start(stage, local, master) for local in range(stage.run.spec.training.processes_per_node)]
    # On SIGTERM the ranks save a checkpoint, then exit.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _signal, ranks, signal.SIGTERM)
    try:
        await _watch(ranks)
    finally:
        _signal(ranks, signal.SIGKILL)
        await asyncio.gather(*(rank.process.wait() for rank in ranks))


async def _watch(ranks: Sequence[RankProcess]) -> None:
    """Return when all ranks are done. If any fail, raise the most informative failure."""
    waiting = {asyncio.create_task(rank.process.wait()) for rank in ranks}
    while waiting:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(rank.process.returncode for rank in ranks):
            if waiting:  # a rank that lost its peer exits too, but only the peer can report why
                await asyncio.wait(waiting, timeout=_GRACE_SECONDS)
            raise min((_failure(rank) for rank in ranks if rank.process.returncode), key=_vagueness)


def _failure(rank: RankProcess) -> Exception:
    code = rank.process.returncode or 0
    if code < 0:
        return StageFailure(
            "RankKilled",
            f"rank {rank.rank} was killed by {signal.Signals(-code).name}; training resumes from its last checkpoint. If it ran out of "
            "memory: lower training.microBatchTokens, enable training.activationCheckpointing or raise training.sequenceParallel (training "
            "still resumes), or raise training.deepspeed.zeroStage (the round restarts)",
            permanent=False,
        )
    try:
        words = json.loads(rank.last_words.read_text())
    except (OSError, ValueError):
        words = {"reason": "Unexpected", "message": "it said nothing; its log may say more"}
    if code in (ExitCode.PERMANENT, ExitCode.UNAVAILABLE):
        return StageFailure(words["reason"], words["message"], permanent=code == ExitCode.PERMANENT)
    return RuntimeError(f"rank {rank.rank} ended with code {code}: {words['message']}")


def _vagueness(failure: Exception) -> int:
    if not isinstance(failure, StageFailure):
        return 2
    if failure.reason == PEER_LOST:
        return 3
    return 0 if failure.permanent else 1


async def _start(stage: Stage, local_rank: int, master: tuple[str, int]) -> RankProcess:
    training = stage.run.spec.training
    rank = stage.index * training.processes_per_node + local_rank
    last_words = stage.scratch / "ranks" / f"{rank}.json"
    last_words.parent.mkdir(parents=True, exist_ok=True)
    last_words.unlink(missing_ok=True)
    # For a rank with a GPU, the offloaded optimiser update is the only CPU work.
    threads = len(os.sched_getaffinity(0)) // training.processes_per_node if training.deepspeed.offload is Offload.OPTIMIZER else 1
    environ = {
        "OMP_NUM_THREADS": f"{max(1, threads)}",
        **stage.environ,
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{local_rank}",
        "WORLD_SIZE": f"{training.nodes * training.processes_per_node}",
        "MASTER_ADDR": master[0],
        "MASTER_PORT": f"{master[1]}",
        "DAGGER_SCRATCH": f"{stage.scratch}",
        "DAGGER_TERMINATION_LOG": f"{last_words}",
        "DS_ACCELERATOR": "cuda" if training.gpus_per_node else "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if training.gpus_per_node and "PYTORCH_CUDA_ALLOC_CONF" not in stage.environ:
        # Passes differ in length, and a freed block of GPU memory of one size cannot serve the next.
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if training.nodes == 1:
        environ["GLOO_SOCKET_IFNAME"] = "lo"  # by default gloo resolves this host's name by DNS
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "dagger_operator.training.rank", env=environ)
    return RankProcess(rank, process, last_words)


def _master(stage: Stage) -> tuple[str, int]:
    """Return the address and port where rank 0 listens for the others."""
    if stage.run.spec.training.nodes > 1:
        try:
            return stage.environ["DAGGER_MASTER_ADDR"], int(stage.environ["DAGGER_MASTER_PORT"])
        except KeyError as missing:
            raise StageFailure("NoMaster", f"training on several nodes needs {missing} in the environment of the stage") from None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return "127.0.0.1", probe.getsockname()[1]


def _signal(ranks: Sequence[RankProcess], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.returncode is None:
            with suppress(ProcessLookupError):
                rank.process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main("training", body))
