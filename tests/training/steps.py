"""A few steps of gradient descent with rate 1, under DeepSpeed in whatever layout, and in a plain loop over labels: for tests."""

import math
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from dagger_operator.api import Training
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.samples import Sample
from training.gradients_on_ranks import Ended, Job, run

BASE = {
    "batchSize": 12,
    "batchUnit": "Labels",
    "steps": {"type": "Constant", "value": 3},
    "microBatchTokens": 300,
    "precision": "FP32",
    "learningRate": 1.0,
    "gradientClip": 1000,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"deepspeed": {"zeroStage": stage}} for stage in range(4)},
    "offload": {"deepspeed": {"zeroStage": 2, "offload": "Optimizer"}},
    **{f"offload-zero{stage}": {"deepspeed": {"zeroStage": stage, "offload": "Optimizer"}} for stage in (1, 3)},
    "labels": {"packing": "Labels", "deepspeed": {"zeroStage": 2}},
    "one-row": {"microBatchTokens": 4096, "deepspeed": {"zeroStage": 1}},
    "parted-trees": {"microBatchTokens": 150, "deepspeed": {"zeroStage": 3}},
    "recompute": {"deepspeed": {"zeroStage": 2}, "activationCheckpointing": True},
    "clipped": {"deepspeed": {"zeroStage": 2}, "gradientClip": 0.05},
    "recompute-zero3": {"deepspeed": {"zeroStage": 3}, "activationCheckpointing": True},
    **{f"bf16-zero{stage}": {"deepspeed": {"zeroStage": stage}, "precision": "BF16"} for stage in (1, 2, 3)},
    **{
        f"bf16-offload-zero{stage}": {"deepspeed": {"zeroStage": stage, "offload": "Optimizer"}, "precision": "BF16"} for stage in (1, 2, 3)
    },
    # The last in its process: DeepSpeed's autocast outlives its engine, and decides the type in which the next one reduces.
    "bf16-zero0": {"deepspeed": {"zeroStage": 0}, "precision": "BF16"},
}
SHARED: dict[str, dict[str, Any]] = {
    f"shared-{name}": {"sequenceParallel": 2, **SETTINGS[name]}
    for name in (
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "offload",
        "offload-zero1",
        "offload-zero3",
        "one-row",
        "parted-trees",
        "recompute",
        "recompute-zero3",
        "clipped",
        "bf16-zero1",
        "bf16-zero2",
        "bf16-offload-zero3",
    )
}
"""Two ranks share every row."""
LORA = {"rank": 4, "alpha": 6}
"""What the tests' adapter is."""


def cross_entropy(policy: Any, sample: Sample) -> Any:
    """Summed over a label's tokens, of which it has one at least, by transformers' own label shift."""
    import torch

    ids = torch.tensor(sample.tokens, dtype=torch.long)[None]
    labels = ids.clone()
    labels[:, : sample.prompt] = -100
    return policy(input_ids=ids, labels=labels).loss * len(sample.targets)


Loss = Callable[[Any, Sample], Any]


def plain_steps(
    policy: Any, trained: Iterable[Any], samples: Sequence[Sample], training: Training, loss_of: Loss = cross_entropy
) -> list[float]:
    """The losses of steps with transformers' own forward pass, one label at a time."""
    import torch

    trained = list(trained)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    curriculum = Curriculum(samples, training, seed=1, round_number=1)
    losses = []
    for step in range(curriculum.steps):
        batch = [samples[index] for index in curriculum.batch(step)]
        total = sum(len(sample.targets) * sample.weight for sample in batch)
        loss_sum = 0.0
        for sample in (sample for sample in batch if len(sample.targets)):
            loss = loss_of(policy, sample) * sample.weight / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
    return losses


@dataclass(frozen=True)
class Plain:
    """What a plain loop makes of a student, or of an adapter: by the names of its weights."""

    losses: list[float]
    before: dict[str, Any]
    after: dict[str, Any]

    def missed_by(self, made: Mapping[str, Any]) -> tuple[float, float]:
        """How far other steps came out elsewhere, by how far these went: for the weight that missed most, and over all weights.

        Of a weight that hardly moved, what is left is rounding of terms that cancel: it is held to a twentieth of how far all went.
        """
        assert made.keys() == self.after.keys()
        moved = {key: float((self.after[key] - self.before[key]).norm()) for key in self.after}
        missed = {key: float((made[key] - self.after[key]).norm()) for key in self.after}
        whole = math.hypot(*moved.values())
        assert whole > 0.01
        return max(missed[key] / max(norm, 0.05 * whole) for key, norm in moved.items()), math.hypot(*missed.values()) / whole


def plain(weights: Path, samples: Sequence[Sample], training: Training, parent: Path | None = None, loss_of: Loss = cross_entropy) -> Plain:
    """With the adapter `parent` it is trained, by peft, in place of the student."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    if parent is not None:
        policy = PeftModel.from_pretrained(policy, parent, is_trainable=True)
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    losses = plain_steps(policy, trained.values(), samples, training, loss_of)
    return Plain(losses, before, {name: weight.detach() for name, weight in trained.items()})


def made(folder: Path, adapted: bool = False) -> dict[str, Any]:
    """The weights in an exported policy, or those of its adapter, by the names that they have in a plain loop."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if not adapted:
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return {name: weight.detach() for name, weight in policy.named_parameters()}
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name.replace(".weight", ".default.weight"): weight for name, weight in stored.items()}


def under_deepspeed(
    ranks: int,
    settings: Mapping[str, dict[str, Any]],
    weights: Path,
    samples: list[Sample],
    folder: Path,
    adapter: Path | None = None,
    **more: Any,
) -> dict[str, tuple[float, ...]]:
    """The losses of each layout; what it made is in `folder`. `more`: of `gradients_on_ranks.Job`, and `accelerator`."""
    ended = ended_under_deepspeed(ranks, settings, weights, samples, folder, adapter, **more)[0]
    losses = {name: how for name, how in ended.items() if not isinstance(how, str)}
    assert losses.keys() == ended.keys(), ended
    return losses


def ended_under_deepspeed(
    ranks: int,
    settings: Mapping[str, dict[str, Any]],
    weights: Path,
    samples: list[Sample],
    folder: Path,
    adapter: Path | None = None,
    accelerator: str = "cpu",
    **more: Any,
) -> list[dict[str, Ended]]:
    """How each layout ended, by rank."""
    layouts = {name: Training.model_validate({**BASE, **setting}) for name, setting in settings.items()}
    job = Job(layouts, weights, samples, folder, adapter, **more)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{probe.getsockname()[1]}"}
    world |= {**_CONSTANT, "DS_ACCELERATOR": accelerator}
    # CUDA survives no fork.
    processes = _forks() if accelerator == "cpu" else multiprocessing.get_context("spawn")
    places = [{**world, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(ranks)]
    running: list[Any] = []
    try:
        for place in places:
            running.append(processes.Process(target=run, args=(job, place)))
            running[-1].start()
        for process in running:
            process.join(800)
        assert [process.exitcode for process in running] == [0] * ranks
    finally:
        for process in running:
            process.kill()
            process.join()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


_CONSTANT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}


@cache
def _forks() -> Any:
    """Makes processes that are forked off one which has imported already what a rank needs: that takes 5 seconds of a core."""
    context: Any = multiprocessing.get_context("forkserver")
    needed = (
        "deepspeed",
        "transformers.models.qwen3.modeling_qwen3",
        "peft",
        "deepspeed.runtime.zero.muon.original_muon",
        "dagger_operator.training.loop",
    )
    context.set_forkserver_preload(list(needed))
    with mock.patch.dict(os.environ, {**_CONSTANT, "DS_ACCELERATOR": "cpu"}):  # what is imported there may read it
        forkserver.ensure_running()
    return context
