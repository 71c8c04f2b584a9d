"""Exports the trained policy as a Hugging Face folder: weights gathered from all ranks, everything else unchanged."""

import shutil
from pathlib import Path

import torch
import torch.distributed
from transformers import PreTrainedModel

from dagger_operator.store.policies import ADAPTER
from dagger_operator.store.stage import StageFailure
from dagger_operator.training import adapters
from dagger_operator.training.engine import Engine
from dagger_operator.training.merging import merge

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")
_OTHER_THAN_POLICY = ("manifest.json",)


def export(engine: Engine, base: Path, folder: Path) -> None:
    """Write the policy to `folder`, which appears atomically. Collective; rank 0 writes. An adapter is merged, and also stored by itself.

    Config, tokenizer, chat template and generation config are copied from `base`, so a server can swap the weights alone. Weights have
    the base's dtype; they come from the optimiser's FP32 master weights if it keeps any.
    """
    policy: PreTrainedModel = engine.module.policy
    state = _gathered(engine, policy)
    if torch.distributed.get_rank() != 0:
        return
    pairs = adapters.pairs(policy, state)
    if not pairs:
        dtype = _stored_dtype(base)
        state = {name: value.to(dtype) for name, value in state.items()}
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise StageFailure(
                "WeightsNotFinite",
                f"{name} is not finite after training: lower training.learningRate or training.gradientClip, or train with precision FP32",
            )
    partial = folder.with_name(folder.name + ".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    if pairs:
        adapters.save(policy, state, partial / ADAPTER)
        merge(base, pairs, partial)
    else:
        policy.save_pretrained(partial, state_dict=state)
    for path in base.iterdir():
        if path.is_file() and path.name not in _OTHER_THAN_POLICY and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copy(path, partial / path.name)
    partial.rename(folder)


def _gathered(engine: Engine, policy: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the whole trained weights by name, in FP32 on the CPU, on rank 0; empty on the other ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = engine.zero_optimization_stage() > 0
    state: dict[str, torch.Tensor] = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = safe_get_full_fp32_param(parameter) if sharded else parameter.detach()
        if torch.distributed.get_rank() == 0:
            state[name] = whole.float().cpu()
    return state


def _stored_dtype(base: Path) -> torch.dtype:
    """Return the dtype in which the base's weights are stored."""
    from safetensors import safe_open

    with safe_open(next(iter(sorted(base.glob("*.safetensors")))), framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
        return tensor.dtype
