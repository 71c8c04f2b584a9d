"""Merges an adapter into its base: the base's own files, with the product of both matrices added to each adapted weight.

The base's files are read again, not gathered from the ranks: they are what the adapter was trained on, in the dtype that is served.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_INDEX = "model.safetensors.index.json"
_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, eq=False)
class Pair:
    """An adapter of one linear layer: adds scaling * b @ a to its weight."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def product(self) -> Tensor:
        return self.scaling * (self.b.float() @ self.a.float())


def tensor_names(base: Path) -> set[str]:
    """Return the names of a policy's tensors whose dtype allows adding to them."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in _files(base):
        with safe_open(path, framework="pt") as file:
            names |= {name for name in file.keys() if file.get_slice(name).get_dtype() in _TYPES}  # noqa: SIM118 - no dictionary
    return names


def merge(base: Path, pairs: Mapping[str, Pair], folder: Path) -> None:
    """Write the merged weights into `folder`: added in FP32, stored in the base's dtype, in files like the base's."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in _files(base):
        with safe_open(path, framework="pt") as file:
            merged = {name: _added(file.get_tensor(name), pairs.get(name.removesuffix(".weight"))) for name in file.keys()}  # noqa: SIM118 - as above
            save_file(merged, folder / path.name, metadata=file.metadata())
    if (base / _INDEX).exists():
        shutil.copy(base / _INDEX, folder / _INDEX)


def _added(weight: Tensor, pair: Pair | None) -> Tensor:
    return weight if pair is None else (weight.float() + pair.product).to(weight.dtype)


def _files(base: Path) -> list[Path]:
    """Return the files that hold the weights: those of the index if there is one."""
    if (base / _INDEX).exists():
        return [base / name for name in sorted(set(json.loads((base / _INDEX).read_text())["weight_map"].values()))]
    return sorted(base.glob("*.safetensors"))
