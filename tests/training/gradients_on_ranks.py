"""One rank of a few steps under DeepSpeed, for `steps`: plain gradient descent with rate 1, so that the change of the weights is the
gradient, or as training does it, from the checkpoint where there is one."""

import asyncio
import functools
import math
import os
import pickle
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
    stopped: bool = False
    """Whether it is asked to end in its first step."""
    poisoned: bool = False
    """Whether gradients of the last rank are no numbers."""


Ended = tuple[float, ...] | str
"""Losses, or why there are none."""


async def nothing(*_: object) -> None:
    pass


def poison(_module: Any, _given: Any, out: Any) -> None:
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * math.nan)


def run(job: Job, place: dict[str, str]) -> None:
    """With `place`, variables as torchrun sets them, in the environment."""
    os.environ.update(place)
    import torch

    from dagger_operator.training import adapters, checkpoints, engine, export, layout, loop

    rank, ranks = int(place["RANK"]), int(place["WORLD_SIZE"])
    device = engine.join(rank, ranks, rank)
    usual = engine.settings
    engine.settings = lambda *given: {**(config := usual(*given)), "zero_optimization": {**config["zero_optimization"], **job.zero}}
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
            tally = asyncio.run(loop.train(*arguments, seed=1, stopping=lambda: job.stopped, observe=nothing, targets_at_once=16))
            out[name] = tally.losses
            export.export(trainer, job.weights, scratch / "policy")
        except StageFailure as failure:
            out[name] = str(failure)
        trainer.destroy()
    (job.folder / f"{rank}.pickle").write_bytes(pickle.dumps(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
