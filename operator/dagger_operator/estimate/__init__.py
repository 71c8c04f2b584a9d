"""Estimates what a run takes on given hardware, from its resource alone, before any money is spent.

Tokens, teacher calls, GPU memory by part, steps, hours and GPU-hours, and what does not fit with the field to change. Formulas over frozen
data: nothing here does I/O or imports torch. Every formula names its source; `docs/estimate.md` lists them all, and compares their
results with published figures (`python -m dagger_operator.estimate`).
"""

from dagger_operator.estimate.assumptions import Assumptions
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import GIB, GPUS, Gpu
from dagger_operator.estimate.memory import Memory
from dagger_operator.estimate.models import KNOWN, Shape, UnknownShape, shape_of
from dagger_operator.estimate.report import as_data
from dagger_operator.estimate.result import Estimate, RoundEstimate
from dagger_operator.estimate.run import estimate
from dagger_operator.estimate.serving import Pool

__all__ = [
    "GIB",
    "GPUS",
    "KNOWN",
    "Assumptions",
    "Estimate",
    "Finding",
    "Gpu",
    "Memory",
    "Pool",
    "RoundEstimate",
    "Shape",
    "UnknownShape",
    "as_data",
    "estimate",
    "shape_of",
]
