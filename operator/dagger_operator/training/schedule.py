"""The learning rate as a function of the step."""

import math

from dagger_operator.api import Training
from dagger_operator.api.training import LearningRateSchedule


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Return the rate of step 0, 1, ... of `steps`: linear warm-up to the peak, then the configured schedule."""
    peak, warmup = training.learning_rate, min(training.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    low = training.min_learning_rate_fraction
    match training.learning_rate_schedule:
        case LearningRateSchedule.CONSTANT:
            return peak
        case LearningRateSchedule.LINEAR:
            return peak * (1 - (1 - low) * done)
        case LearningRateSchedule.COSINE:
            return peak * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
