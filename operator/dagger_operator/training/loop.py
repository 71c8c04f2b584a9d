"""The training loop."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace

import structlog
import torch
import torch.distributed

from dagger_operator.api import Training
from dagger_operator.api.training import TARGETS_AT_ONCE, Loss
from dagger_operator.store.draws import draw
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.agreement import check_agreement
from dagger_operator.training.batches import Curriculum, Limits, Pass, padding, spread
from dagger_operator.training.checkpoints import Checkpoints, Tally
from dagger_operator.training.engine import Engine, gradient_norm, gradients_divided_by, take_step
from dagger_operator.training.guards import refuse_broken, refuse_skipped
from dagger_operator.training.layout import Rank
from dagger_operator.training.metrics import Step
from dagger_operator.training.packing import Pack, pack
from dagger_operator.training.rows import collate
from dagger_operator.training.samples import Sample
from dagger_operator.training.schedule import learning_rate


async def train(
    engine: Engine,
    samples: Sequence[Sample],
    curriculum: Curriculum,
    training: Training,
    rank: Rank,
    checkpoints: Checkpoints,
    tally: Tally,
    seed: int,
    stopping: Callable[[], bool],
    observe: Callable[[Tally, Step], Awaitable[None]],
    targets_at_once: int = TARGETS_AT_ONCE,
) -> Tally:
    """Take the steps that `tally` still lacks, and return the tally of all of them. Every rank calls it with the same samples.

    `targets_at_once` bounds the logits in memory: rows of the vocabulary's width, in FP32.
    """
    # A divergence takes twice the memory: the tail needs a second copy of the logits.
    limits = rank.limits(training, targets_at_once // 2 if training.loss is Loss.FORWARD_KL else targets_at_once)
    if tally.steps < curriculum.steps:
        agreement = check_agreement(engine, [samples[index] for index in curriculum.batch(tally.steps)], training, rank, limits)
        if rank.index == 0:
            structlog.get_logger().info("attention over trees checked", **asdict(agreement))
    for step in range(tally.steps, curriculum.steps):
        started = time.monotonic()
        torch.manual_seed(draw("training step", seed, step, rank.index))  # derived from the step: no random state to checkpoint
        batch = [samples[index] for index in curriculum.batch(step)]
        packs = pack(batch, limits.tokens, training.packing)
        passes = spread(packs, rank.groups, limits)
        loss = _gradients(engine, packs, passes, rank, limits, stopping)
        if loss is None:  # the step is not taken, so the state before it is stored
            await checkpoints.save(engine, tally)
            then = "training resumes from its checkpoint" if tally.steps else "training restarts"
            raise StageFailure("Terminated", f"asked to end after step {tally.steps} of {curriculum.steps}; {then}", permanent=False)
        refuse_broken(loss, tally.losses, batch)
        rate = learning_rate(training, step, curriculum.steps)
        refuse_skipped(take_step(engine, rate), tally.losses, batch)
        done = Step(
            loss=loss,
            labels=len(batch),
            tokens=sum(map(len, packs)),
            padding=padding(passes, packs, limits),
            unpacked=sum(len(sample.strand) - 1 for sample in batch),
            learning_rate=rate,
            gradient_norm=gradient_norm(engine),
            seconds=time.monotonic() - started,
        )
        tally = tally.with_step(done)
        if tally.steps < curriculum.steps and _any(checkpoints.due(tally.steps)):
            done = replace(done, checkpoint_seconds=await checkpoints.save(engine, tally))
        await observe(tally, done)
    return tally


def _gradients(
    engine: Engine, packs: Sequence[Pack], passes: Sequence[Pass], rank: Rank, limits: Limits, stopping: Callable[[], bool]
) -> float | None:
    """Accumulate the gradient of one step in the engine, and return the mean loss over all its targets.

    Returns None if any rank has been asked to stop: checked after every pass, since a step may outlast the notice period.
    """
    weight = sum(float(one.weights.sum()) for one in packs)
    total = torch.zeros((), dtype=torch.float64, device=rank.device)
    for each in passes:
        mine = [packs[index] for index in each.packs[rank.group]]
        loss = engine(**collate(mine, limits, rank.share, rank.device), pieces=each.pieces)
        # Divided by the weight of the whole step and multiplied by what DeepSpeed divides by, it is the mean over all targets.
        engine.backward(loss * (gradients_divided_by(engine, rank.of, rank.groups) / weight))
        total += loss.detach()
        if _any(stopping()):
            return None
    torch.distributed.all_reduce(total)
    return float(total) / weight


def _any(word: bool) -> bool:
    """Whether `word` is true on any rank. Uses a tensor on the CPU, so that no rank waits for its GPU."""
    said = torch.tensor(int(word))
    torch.distributed.all_reduce(said)
    return bool(said)
