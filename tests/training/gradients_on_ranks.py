"""One rank of a few steps under DeepSpeed, for `steps`: plain gradient descent with rate 1, so that the change of the weights is the
gradient, or as training does it, from the checkpoint where there is one. Arguments: a pickled job, and where rank 0 leaves the results.
"""

import asyncio
import functools
import os
import pickle
import sys
from pathlib import Path

import torch

from dagger_operator.api import Storage, Training
from dagger_operator.store.objects import Store
from dagger_operator.training import adapters, checkpoints, engine, export, layout, loop
from dagger_operator.training.batches import Curriculum


async def nothing(*_: object) -> None:
    pass


def main(job_file: str, results: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = pickle.loads(Path(job_file).read_bytes())
    device = engine.join(rank, ranks, rank)
    out = {}
    for name, settings in job["settings"].items():
        training = Training.model_validate({**job["training"], **settings})
        optimizer = engine.adamw(training) if job["adam"] else functools.partial(torch.optim.SGD, lr=1.0)
        adapter = adapters.Adapter(training.lora, 1, "tiny", parent=job["adapter"]) if training.lora else None
        trainer = engine.build(training, job["weights"], ranks, device, optimizer, adapter)
        curriculum = Curriculum(job["samples"], training, seed=1, round_number=1)
        scratch = Path(results) / name
        store = Store.open(Storage(url=f"file://{scratch}/store"))
        stage = training.deepspeed.zero_stage
        kept = checkpoints.Checkpoints(store, scratch, 1, "", zero_stage=stage, node=0, every_steps=training.checkpoint_every_steps)
        begun = asyncio.run(kept.resume(trainer))
        assert (begun.steps > 0) == job["goes_on"], name
        place = layout.Rank(rank, ranks, device, training.sequence_parallel)
        arguments = (trainer, job["samples"], curriculum, training, place, kept, begun)
        tally = asyncio.run(loop.train(*arguments, seed=1, stopping=lambda: False, observe=nothing, targets_at_once=16))
        export.export(trainer, job["weights"], scratch / "policy")
        out[name] = tally.losses
        trainer.destroy()
    if rank == 0:
        (Path(results) / "losses.pickle").write_bytes(pickle.dumps(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
