"""A few steps of gradient descent with rate 1, under DeepSpeed in whatever layout, and in a plain loop over labels: for tests."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dagger_operator.api import Training
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.samples import Sample

BASE = {
    "batchSize": 9,
    "batchUnit": "Labels",
    "steps": {"type": "Constant", "value": 2},
    "microBatchTokens": 300,
    "precision": "FP32",
    "learningRate": 1.0,
    "gradientClip": 1000,
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"deepspeed": {"zeroStage": stage}} for stage in range(4)},
    "offload": {"deepspeed": {"zeroStage": 2, "offload": "Optimizer"}},
    "labels": {"packing": "Labels", "deepspeed": {"zeroStage": 2}},
    "one-row": {"microBatchTokens": 4096, "deepspeed": {"zeroStage": 1}},
    "parted-trees": {"microBatchTokens": 150, "deepspeed": {"zeroStage": 3}},
    "recompute": {"deepspeed": {"zeroStage": 2}, "activationCheckpointing": True},
    "clipped": {"deepspeed": {"zeroStage": 2}, "gradientClip": 0.05},
    "recompute-zero3": {"deepspeed": {"zeroStage": 3}, "activationCheckpointing": True},
    **{f"bf16-zero{stage}": {"deepspeed": {"zeroStage": stage}, "precision": "BF16"} for stage in range(4)},
}
SHARED: dict[str, dict[str, Any]] = {
    f"shared-{name}": {"sequenceParallel": 2, **SETTINGS[name]}
    for name in ("zero0", "zero1", "zero2", "zero3", "offload", "one-row", "parted-trees", "recompute", "recompute-zero3", "bf16-zero2")
}
"""Both ranks share every row."""


def plain_steps(policy: Any, trained: Iterable[Any], samples: Sequence[Sample], training: Training) -> list[float]:
    """The losses of steps with transformers' own forward pass and label shift, one label at a time."""
    import torch

    trained = list(trained)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    curriculum = Curriculum(samples, training, seed=1, round_number=1)
    losses = []
    for step in range(curriculum.steps):
        batch = [samples[index] for index in curriculum.batch(step)]
        total = sum(len(sample.targets) for sample in batch)
        loss_sum = 0.0
        for sample in batch:
            ids = torch.tensor(sample.tokens, dtype=torch.long)[None]
            labels = ids.clone()
            labels[:, : sample.prompt] = -100
            loss = policy(input_ids=ids, labels=labels).loss * len(sample.targets) / total
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
    return losses


def under_deepspeed(
    ranks: int, settings: dict[str, dict[str, Any]], weights: Path, samples: list[Sample], folder: Path, adapter: Path | None = None
) -> dict[str, tuple[float, ...]]:
    job = folder / "job.pickle"
    given = {"weights": weights, "samples": samples, "training": BASE, "settings": settings, "adapter": adapter}
    job.write_bytes(pickle.dumps(given))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": f"{ranks}"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("gradients_on_ranks.py")), str(job), str(folder)]
    running = [subprocess.Popen(command, env={**environ, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=800) for process in running] == [0] * ranks
    finally:
        for process in running:
            process.kill()
            process.wait()
    return pickle.loads((folder / "losses.pickle").read_bytes())
