"""The training loop."""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed

from dagger_operator.api import Training
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.batches import Curriculum, padding, spread
from dagger_operator.training.checkpoints import Checkpoints, Tally
from dagger_operator.training.engine import Engine, gradient_norm, set_learning_rate
from dagger_operator.training.loss import collate
from dagger_operator.training.metrics import Step
from dagger_operator.training.packing import pack
from dagger_operator.training.samples import Sample
from dagger_operator.training.schedule import learning_rate


@dataclass(frozen=True)
class Rank:
    index: int
    of: int
    device: torch.device


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
    targets_at_once: int = 4096,
) -> Tally:
    """Takes the steps that `tally` has not yet, and returns the tally of all of them. Every rank calls it with the same samples.

    `targets_at_once` bounds the logits in memory: so many rows of the vocabulary's width, in FP32.
    """
    for step in range(tally.steps, curriculum.steps):
        started = time.monotonic()
        torch.manual_seed(hash((seed, step, rank.index)))  # a step's randomness follows from the step: nothing of it to checkpoint
        batch = [samples[index] for index in curriculum.batch(step)]
        packs = pack(batch)
        weight = sum(float(pack.weights.sum()) for pack in packs)

        loss_sum = torch.zeros((), dtype=torch.float64, device=rank.device)
        passes = spread(packs, rank.of, training.micro_batch_tokens, targets_at_once)
        for turn in passes:
            mine = [packs[index] for index in turn.packs[rank.index]]
            loss = engine(**collate(mine, rank.device), pieces=turn.pieces)
            # DeepSpeed averages gradients over ranks: times ranks, by the targets of the whole step, is the mean over all targets.
            engine.backward(loss * (rank.of / weight))
            loss_sum += loss.detach()

        # One small sum over ranks: the step's loss, whether a rank must end, whether a checkpoint is due.
        stop, due = stopping(), checkpoints.due(step + 1)
        word = torch.tensor([float(loss_sum) / weight, stop, due], dtype=torch.float64, device=rank.device)
        torch.distributed.all_reduce(word)
        mean, stops, dues = word.tolist()
        if not math.isfinite(mean):
            raise StageFailure(
                "LossNotFinite",
                f"the loss of step {step + 1} is {mean}: lower training.learningRate or training.gradientClip, or train with "
                "precision FP32; the weights before this round are unharmed",
            )
        rate = learning_rate(training, step, curriculum.steps)
        set_learning_rate(engine, rate)
        engine.step()

        done = Step(
            loss=mean,
            labels=len(batch),
            tokens=sum(map(len, packs)),
            padding=padding(passes, packs),
            unpacked=sum(len(sample.tokens) - 1 for sample in batch),
            learning_rate=rate,
            gradient_norm=gradient_norm(engine),
            seconds=time.monotonic() - started,
        )
        tally = tally.with_step(done)
        if stops or (dues and tally.steps < curriculum.steps):
            done = replace(done, checkpoint_seconds=await checkpoints.save(engine, tally))
        if stops:
            message = f"asked to end after step {tally.steps} of {curriculum.steps}; training goes on from its checkpoint"
            raise StageFailure("Terminated", message, permanent=False)
        await observe(tally, done)
    return tally
