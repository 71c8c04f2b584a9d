"""However a step is packed, cut, accumulated, sharded and spread over ranks, its gradient is that of a plain loop over labels."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Training
from dagger_operator.store.records import Trajectory
from dagger_operator.training.batches import Curriculum
from dagger_operator.training.samples import Sample, tokenise
from dagger_operator.training.template import StudentTemplate

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

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


@pytest.fixture(scope="module")
def samples(tokenizer_with: Callable[[str], Any], trajectories: list[Trajectory]) -> list[Sample]:
    return list(tokenise(trajectories, StudentTemplate(tokenizer_with("qwen3_instruct")), 4096).samples)


def plain(weights: Path, samples: list[Sample], training: Training) -> tuple[list[float], dict[str, Any]]:
    """Steps of gradient descent with rate 1 by transformers' own forward pass and label shift, one label at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
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
        torch.nn.utils.clip_grad_norm_(policy.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum)
    return losses, {name: value.detach().clone() for name, value in policy.named_parameters()}


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


@pytest.mark.parametrize(("ranks", "layouts"), [(1, SETTINGS), (2, SETTINGS), (2, SHARED)], ids=["one rank", "two ranks", "shared rows"])
def test_every_layout_takes_the_steps_of_a_plain_loop(
    ranks: int, layouts: dict[str, dict[str, Any]], policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before = dict(AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32).named_parameters())
    found = under_deepspeed(ranks, layouts, policy_folder, samples, tmp_path)
    for name, settings in layouts.items():
        losses, weights = plain(policy_folder, samples, Training.model_validate({**BASE, **settings}))
        low_precision = "bf16" in name
        assert found[name] == pytest.approx(losses, rel=2e-2 if low_precision else 1e-5), name
        trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / name / "policy", dtype=torch.float32).named_parameters())
        assert trained.keys() == weights.keys()
        moved = torch.cat([(weights[key] - before[key]).flatten() for key in weights])
        missed = torch.cat([(trained[key] - weights[key]).flatten() for key in weights])
        assert moved.norm() > 0.01
        assert missed.norm() / moved.norm() < (5e-2 if low_precision else 1e-5), name
