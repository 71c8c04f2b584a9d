"""Low-rank adapters (LoRA, arXiv 2106.09685), inserted into the policy by peft; nothing else is trained.

Every round's adapter applies to the same base weights, those of the run's first policy. So the adapter alone describes a round's policy,
and one server can hold the policies of all rounds.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dagger_operator.api.training import Lora
from dagger_operator.store.stage import StageFailure
from dagger_operator.training.merging import Pair, tensor_names

if TYPE_CHECKING:
    from dagger_operator.training.engine import Engine

_NAME = "default"
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""Prefix of every name in peft's files."""


@dataclass(frozen=True)
class Adapter:
    """A round's adapter and what it starts from."""

    lora: Lora
    seed: int
    """Seed of the initial weights of a new adapter."""
    base_model: str
    """Name of the base model, for whoever loads the adapter."""
    revision: str | None = None
    """Commit of the base model, if it is on the hub."""
    parent: Path | None = None
    """Folder of the adapter to continue from; None starts a new one, which initially changes nothing."""


def attach(policy: Any, adapter: Adapter, base: Path) -> dict[str, Tensor]:
    """Insert the adapter into `policy`, whose weights are those in folder `base`, and freeze everything else. Return the parent's weights
    by parameter name, in FP32: the policy may hold them in lower precision.

    Raises `StageFailure` if this is not possible.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base_model,
        revision=adapter.revision,
        r=adapter.lora.rank,
        lora_alpha=adapter.lora.alpha,
        lora_dropout=0.0,  # one pass trains many labels, and a repeated step must give the same result
        target_modules=_targets(policy, adapter.lora.target_modules, base),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapter.seed)
        inject_adapter_in_model(config, policy, _NAME)
    if adapter.parent is None:
        return {}
    given, own = _read(adapter.parent), {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    if {name: weight.shape for name, weight in given.items()} != {name: weight.shape for name, weight in own.items()}:
        raise StageFailure("AdapterDoesNotFit", "the adapter of the round before has other modules or another rank than training.lora says")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(given[name])
    return given


def sharpen(engine: "Engine", exact: Mapping[str, Tensor]) -> None:
    """Set the optimiser's FP32 weights exactly, undoing the policy's cast to BF16, so that rounding does not accumulate over rounds."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, weight in engine.module.policy.named_parameters():
        if name not in exact:
            continue
        if hasattr(weight, "ds_tensor"):  # ZeRO-3 shards evenly; the last shard may extend past the end of the weight
            part, flat = weight.ds_tensor.numel(), exact[name].flatten()
            start = torch.distributed.get_rank(weight.ds_process_group) * part
            mine = torch.nn.functional.pad(flat[start : start + part], (0, max(0, start + part - max(start, len(flat)))))
            safe_set_local_fp32_param(weight, mine)
        else:
            safe_set_full_fp32_param(weight, exact[name])


def pairs(policy: Any, weights: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Return both matrices of each module that has an adapter, from weights by parameter name; empty without an adapter."""
    modules = sorted(name.removesuffix(_A) for name in weights if name.endswith(_A))
    if not modules:
        return {}
    config = policy.peft_config[_NAME]
    return {module: Pair(weights[module + _A], weights[module + _B], config.lora_alpha / config.r) for module in modules}


def save(policy: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter to a folder as peft and vLLM read it; the same weights give the same bytes."""
    from safetensors.torch import save_file

    config = policy.peft_config[_NAME]
    config.save_pretrained(folder)
    written = json.loads((folder / _CONFIG).read_text())
    written |= {"target_modules": sorted(written["target_modules"]), "inference_mode": True}  # peft keeps an unordered set
    (folder / _CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    save_file({_in_file(name): weight.contiguous() for name, weight in weights.items()}, folder / _WEIGHTS, metadata={"format": "pt"})


def _in_file(parameter: str) -> str:
    return _PREFIX + parameter.replace(f".{_NAME}.weight", ".weight")


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(folder / _WEIGHTS)
    return {name.removeprefix(_PREFIX).removesuffix(".weight") + f".{_NAME}.weight": weight.float() for name, weight in stored.items()}


def _targets(policy: Any, wanted: Collection[str] | None, base: Path) -> list[str]:
    """Return names of linear layers of the decoder as peft expects them: suffixes of module names."""
    inside = set(map(id, policy.get_decoder().modules()))
    modules = dict(policy.named_modules())
    linear = {name for name, module in modules.items() if id(module) in inside and isinstance(module, torch.nn.Linear)}
    names = sorted(wanted or {name.rpartition(".")[2] for name in linear})
    chosen: set[str] = set()
    for name in names:
        found = {module for module in modules if module == name or module.endswith(f".{name}")}
        if not found or found - linear:
            ends = ", ".join(sorted({module.rpartition(".")[2] for module in linear}))
            raise StageFailure(
                "NoSuchModule", f"training.lora.targetModules: {name!r} is no linear layer of the student's decoder; those are: {ends}"
            )
        chosen |= found
    if missing := {f"{module}.weight" for module in chosen} - tensor_names(base):
        raise StageFailure(
            "UnsupportedStudent",
            f"student.model: its files hold no {min(missing)} in BF16, FP16 or FP32, into which an adapter could be merged: "
            "leave training.lora out, or take a student such as Qwen3",
        )
    return names
