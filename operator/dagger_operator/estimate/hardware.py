"""GPUs known to the estimate."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Properties of one GPU that the formulas need."""

    name: str
    memory: float
    """Bytes that CUDA reports, which is a little less than the nominal size."""
    flops: float
    """Dense BF16 FLOP/s of the tensor cores; data sheets often state twice as much, with sparsity."""
    bandwidth: float
    """Bytes per second between memory and processor."""


def _gpu(name: str, gib: float, tflops: float, tbps: float) -> Gpu:
    return Gpu(name, gib * GIB, tflops * 1e12, tbps * 1e12)


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40GB", 39.4, 312, 1.555),
        _gpu("A100-80GB", 79.1, 312, 2.039),
        _gpu("H100-80GB", 79.18, 989, 3.35),
        _gpu("H200", 139.8, 989, 4.8),
        _gpu("B200", 178.4, 2250, 7.7),
        _gpu("L40S", 44.4, 362, 0.864),
        _gpu("A6000", 47.4, 155, 0.768),
    )
}
"""FLOP/s and bandwidth: NVIDIA's data sheets (A100 SXM, H100 SXM, H200 SXM, HGX B200, L40S, RTX A6000), without sparsity.
Memory of H100, H200, B200 and A6000: peak in GiB divided by peak in percent, from prime-rl's stored benchmarks (`benchmarks/baselines`);
of the others the total capacity stated in PyTorch's out-of-memory messages."""
