"""One process of the trainer, started by the stage for every rank: `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`
identify it, as under torchrun.

Ranks divide the tokenising among themselves, then all hold all samples, so that each can compute every step's plan without
communication.
"""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import asyncio
import importlib.metadata
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CollectorRegistry

from dagger_operator.api import TrainingSummary
from dagger_operator.api.training import Loss
from dagger_operator.store.draws import draw
from dagger_operator.store.exposition import exposed
from dagger_operator.store.policies import policy_manifest, save_policy
from dagger_operator.store.progress import Reporter
from dagger_operator.store.results import TrainingResult, read_result, save_result
from dagger_operator.store.stage import Stage, main
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.inputs import Inputs, adapter_folder, digest, inputs, weights_folder
from dagger_operator.training.metrics import Step, TrainerMetrics
from dagger_operator.training.peers import losing_peers
from dagger_operator.training.samples import Tokenised, joined, tokenise
from dagger_operator.training.template import StudentTemplate, template_options

if TYPE_CHECKING:
    from dagger_operator.training.adapters import Adapter
    from dagger_operator.training.checkpoints import Checkpoints, Tally

_MEAN_OF = 10
"""Number of steps over which the first and the last loss are averaged."""


async def body(stage: Stage) -> None:
    """Train and export the policy, and store it and, on rank 0, the stage's result."""
    # One rank of each pod serves metrics to Prometheus.
    with exposed(stage.environ if os.environ["LOCAL_RANK"] == "0" else {}) as registry, losing_peers():
        await _train(stage, registry)


async def _train(stage: Stage, registry: CollectorRegistry) -> None:
    started = time.monotonic()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Heavy and slow to import: only the ranks need it.
    import torch.distributed

    from dagger_operator.training import checkpoints, engine, export, layout, loop

    spec = stage.run.spec
    given = await inputs(stage)
    weights = weights_folder(stage.scratch, given.base)
    if await read_result(stage.store, stage.round, TrainingResult) is not None:
        return  # rank 0 stored it while this pod was being recreated: no peers are left
    device = engine.join(rank, ranks, int(os.environ["LOCAL_RANK"]), f"{stage.run.metadata.uid}/{stage.round}")

    tokenised = await _tokenise(stage, given, weights, rank, ranks)
    curriculum = Curriculum(tokenised.samples, spec.training, seed=spec.seed, round_number=stage.round)
    with engine.within_memory(rank):
        policy = engine.build(spec.training, weights, ranks, device, engine.adamw(spec.training), await _adapter(stage, given))
    settings = given.settings(stage)
    kept = checkpoints.Checkpoints(
        stage.store,
        stage.scratch,
        stage.round,
        digest({**given.course(stage), "software": _software(stage), "device": device.type}),
        zero_stage=spec.training.deepspeed.zero_stage,
        node=stage.index,
        every_steps=spec.training.checkpoint_every_steps,
    )
    tally = await kept.resume(policy)
    observer = _Observer(stage, rank, curriculum.steps, registry)
    await observer.begin(tally)
    if rank == 0:
        counts = {"steps": curriculum.steps, "from_step": tally.steps, "labels": len(tokenised.samples), "too_long": tokenised.too_long}
        counts |= {"hard_labels": tokenised.hard_labels} if spec.training.loss is Loss.FORWARD_KL else {}
        observer.log.info("training", **counts, setup_seconds=round(time.monotonic() - started, 2))

    with engine.within_memory(rank):
        tally = await loop.train(
            policy,
            tokenised.samples,
            curriculum,
            spec.training,
            layout.Rank(rank, ranks, device, spec.training.sequence_parallel),
            kept,
            tally,
            seed=spec.seed,
            stopping=asked_to_end(),
            observe=observer.observe,
        )

    folder = stage.scratch / "export"
    export.export(policy, weights, folder)
    summary = await _store(stage, given, settings, tokenised, kept, tally, folder, started) if rank == 0 else None
    # A completed pod is not restarted: if rank 0 were lost before everything is stored, its replacement would wait for the others forever.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if summary is not None:
        await kept.forget()
        observer.log.info("training done", **summary.wire())


def asked_to_end() -> Callable[[], bool]:
    """Return a function that reports whether SIGTERM has arrived since. Python handles signals between any two instructions; an event loop
    would notice only after a step, which awaits nothing."""
    asked = threading.Event()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked.is_set


async def _adapter(stage: Stage, given: Inputs) -> "Adapter | None":
    """Return the adapter to train instead of all weights, if the run asks for one."""
    from dagger_operator.training.adapters import Adapter

    lora, spec = stage.run.spec.training.lora, stage.run.spec
    if lora is None:
        return None
    name, model = (await policy_manifest(stage.store, given.base)).base_model, spec.student.model
    revision = name.removeprefix(f"{model}@") if name.startswith(f"{model}@") else None  # a model from the hub is named with its commit
    parent = adapter_folder(stage.scratch, given.parent) if given.adapted else None
    return Adapter(lora, draw("adapter", spec.seed, stage.round), model if revision else name, revision, parent)


async def _store(
    stage: Stage,
    given: Inputs,
    settings: dict[str, Any],
    tokenised: Tokenised,
    kept: "Checkpoints",
    tally: "Tally",
    folder: Path,
    started: float,
) -> TrainingSummary:
    """Store the new policy version, then the result that proves it. Raises `StageFailure` if another training of this round began since."""
    await kept.require_term()  # a second version would stay in the store, and nothing would refer to it
    base = await policy_manifest(stage.store, given.parent)
    made = await save_policy(
        stage.store,
        folder,
        round=stage.round,
        base_model=base.base_model,
        parent=given.parent,
        data_digest=given.data.digest,
        settings=settings,
        software=_software(stage),
    )
    summary = TrainingSummary(
        steps=tally.steps,
        labels=tally.labels,
        tokens=tally.tokens,
        token_ratio=round(tally.unpacked / tally.tokens, 3),
        too_long=tokenised.too_long,
        hard_labels=tokenised.hard_labels,
        first_loss=_mean(tally.losses[:_MEAN_OF]),
        last_loss=_mean(tally.losses[-_MEAN_OF:]),
        checkpoint=made.version,
        seconds=round(time.monotonic() - started, 3),
    )
    await kept.require_term()  # storing the version took long
    await save_result(stage.store, stage.round, TrainingResult(summary=summary, policy=made.version, losses=tally.losses))
    return summary


async def _tokenise(stage: Stage, given: Inputs, weights: Path, rank: int, ranks: int) -> Tokenised:
    """Return all samples; each trajectory is tokenised by one rank."""
    import torch.distributed
    from transformers import AutoTokenizer

    served = stage.run.spec.student.served
    tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    template = StudentTemplate(tokenizer, template_options(served.extra_args if served else []))
    training = stage.run.spec.training
    soft_below = len(tokenizer) if training.loss is Loss.FORWARD_KL else None
    mine: list[Tokenised] = []
    position = 0
    async for shard, trajectories in given.data.shards():
        dealt = trajectories[(rank - position) % ranks :: ranks]
        mine.append(tokenise(dealt, template, training.max_sequence_tokens, training.label_weights, soft_below, shard))
        position += len(trajectories)
    parts: list[list[Tokenised] | None] = [None] * ranks
    torch.distributed.all_gather_object(parts, mine)
    return joined([one for part in parts if part is not None for one in part], training)


class _Observer:
    """Reports steps, on rank 0: every step to Prometheus, to the log and the store from time to time."""

    def __init__(self, stage: Stage, rank: int, steps: int, registry: CollectorRegistry) -> None:
        self._steps = steps
        self._metrics = TrainerMetrics(registry) if rank == 0 else None
        self._reporter = Reporter(stage.store, stage.round, "training", "steps")
        self.log = structlog.get_logger()

    async def begin(self, tally: "Tally") -> None:
        if self._metrics is not None:
            self._metrics.begun(tally.steps / self._steps)
            await self._reporter.tell(tally.steps, self._steps, seconds=tally.seconds)

    async def observe(self, tally: "Tally", step: Step) -> None:
        if self._metrics is None:
            return
        self._metrics.stepped(step, tally.steps / self._steps)
        counters = {"loss": _mean(tally.losses[-_MEAN_OF:]), "tokens_per_second": tally.tokens / max(tally.seconds, 1e-9)}
        if await self._reporter.tell(tally.steps, self._steps, counters=counters, seconds=tally.seconds):
            rounded = {"loss": round(counters["loss"], 5), "tokens_per_second": round(counters["tokens_per_second"])}
            self.log.info("step", step=tally.steps, of=self._steps, **rounded)


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def _software(stage: Stage) -> dict[str, str]:
    names = ["dagger-operator", "torch", "transformers", "deepspeed", *(["peft"] if stage.run.spec.training.lora else [])]
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main("training", body))
