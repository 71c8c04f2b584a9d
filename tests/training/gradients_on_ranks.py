"""One rank of a few steps under DeepSpeed, for `steps`: plain gradient descent with rate 1, so that the change of the weights is the
gradient, or as training does it, from the checkpoint where there is one."""

import asyncio
import functools
import gc
import math
import os
import pickle
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagger_operator.api import Storage, Training
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.samples import Sample


@dataclass(frozen=True)
class Job:
    """Trainings one after the other, by name."""

    layouts: Mapping[str, Training]
    weights: Path
    samples: list[Sample]
    folder: Path
    """Where each leaves its checkpoints and its policy, and each rank how all ended."""
    adapter: Path | None = None
    """What adapters start from."""
    adam: bool = False
    goes_on: bool = False
    """Whether from the checkpoint that an earlier job left in the same folder."""
    zero: Mapping[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's settings for ZeRO."""
    notice_after: int | None = None
    """After how many steps SIGTERM reaches the last rank, and no other."""
    poisoned: bool = False
    """Whether gradients of the last rank are no numbers."""


Ended = tuple[float, ...] | str
"""Losses, or why there are none."""


_SHARDED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
"""ZeRO-3 would keep all of a tiny student's weights on every rank, as it does norms of a large one, and those that come again soon."""


def poison(_module: Any, _given: Any, out: Any) -> None:
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * math.nan)


def run(job: Job, place: dict[str, str]) -> None:
    """With `place`, variables as torchrun sets them, in the environment."""
    gc.freeze()  # what was imported before the fork: a collection would read it all, and each page that it touches is copied
    os.environ.update(place)
    import torch

    from dagger_operator.training import adapters, checkpoints, engine, export, layout

    rank, ranks = int(place["RANK"]), int(place["WORLD_SIZE"])
    device = engine.join(rank, ranks, rank, "test")
    usual = engine.settings
    engine.settings = lambda *given: {
        **(config := usual(*given)),
        "zero_optimization": {**config["zero_optimization"], **_SHARDED, **job.zero},
    }
    out: dict[str, Ended] = {}
    for name, training in job.layouts.items():
        optimizer = engine.adamw(training) if job.adam else functools.partial(torch.optim.SGD, lr=1.0)
        adapter = adapters.Adapter(training.lora, 1, "tiny", parent=job.adapter) if training.lora else None
        trainer = engine.build(training, job.weights, ranks, device, optimizer, adapter)
        curriculum = Curriculum(job.samples, training, seed=1, round_number=1)
        scratch = job.folder / name
        store = Store.open(Storage(url=f"file://{scratch}/store"))
        stage = training.deepspeed.zero_stage
        kept = checkpoints.Checkpoints(store, scratch, 1, "", zero_stage=stage, node=0, every_steps=training.checkpoint_every_steps)
        if job.poisoned and rank == ranks - 1:
            trainer.module.policy.get_decoder().norm.register_forward_hook(poison)
        begun = asyncio.run(kept.resume(trainer))
        assert (begun.steps > 0) == job.goes_on, name
        where = layout.Rank(rank, ranks, device, training.sequence_parallel)
        arguments = (trainer, job.samples, curriculum, training, where, kept, begun)
        try:
            out[name] = asyncio.run(_losses(job.notice_after if rank == ranks - 1 else None, *arguments))
            export.export(trainer, job.weights, scratch / "policy")
        except StageFailure as failure:
            out[name] = str(failure)
        trainer.destroy()
    (job.folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


async def _losses(notice_after: int | None, *arguments: Any) -> tuple[float, ...]:
    """Of a training, in which SIGTERM comes after so many steps."""
    from dagger_operator.training import loop, rank

    async def observe(tally: Any, _: object) -> None:
        if tally.steps == notice_after:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = rank.asked_to_end()
    if notice_after == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    losses: tuple[float, ...] = (await loop.train(*arguments, seed=1, stopping=stopping, observe=observe, targets_at_once=16)).losses
    return losses
