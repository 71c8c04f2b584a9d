"""Prometheus metrics of the trainer (docs/metrics.md): rank 0 reports for all ranks."""

import math
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Step:
    """One optimiser step, over all ranks."""

    loss: float
    """Mean over its targets."""
    labels: int
    tokens: int
    """Tokens of its forward passes, excluding padding."""
    padding: int
    """Tokens of padding in those passes."""
    unpacked: int
    """Tokens that one sequence per label would have had."""
    learning_rate: float
    gradient_norm: float | None
    """Before clipping; None if DeepSpeed does not report it (without ZeRO)."""
    seconds: float
    checkpoint_seconds: float | None = None
    """None if no checkpoint was due after the step."""


class TrainerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._loss = Gauge("dagger_training_loss", "Mean loss over the label tokens of the last step.", registry=registry)
        self._rate = Gauge("dagger_training_learning_rate", "Learning rate of the last step.", registry=registry)
        self._norm = Gauge("dagger_training_gradient_norm", "Gradient norm of the last step, before clipping.", registry=registry)
        self._progress = Gauge("dagger_training_progress_ratio", "Steps taken, by the steps of the round.", registry=registry)
        for of_a_step in (self._loss, self._rate, self._norm):
            of_a_step.set(math.nan)  # 0 would be a value, and the norm may never be reported
        self._steps = Counter("dagger_training_steps", "Optimiser steps of this process.", registry=registry)
        self._labels = Counter("dagger_training_labels", "Labels trained on.", registry=registry)
        self._tokens = Counter("dagger_training_tokens", "Tokens of forward passes, padding left out.", registry=registry)
        self._padding = Counter("dagger_training_padding_tokens", "Padding of forward passes.", registry=registry)
        self._unpacked = Counter(
            "dagger_training_unpacked_tokens", "Tokens that one sequence for each label would have cost.", registry=registry
        )
        self._seconds = Histogram("dagger_training_step_seconds", "One optimiser step.", buckets=_SECONDS, registry=registry)
        self._checkpoint = Histogram(
            "dagger_training_checkpoint_seconds", "Until a checkpoint was in storage.", buckets=_SECONDS, registry=registry
        )

    def begun(self, progress: float) -> None:
        """Set the initial progress: share of the round's steps that are done, by this process and earlier ones."""
        self._progress.set(progress)

    def stepped(self, step: Step, progress: float) -> None:
        """Record a step; `progress` as in `begun`."""
        self._loss.set(step.loss)
        self._rate.set(step.learning_rate)
        if step.gradient_norm is not None:
            self._norm.set(step.gradient_norm)
        self._progress.set(progress)
        self._steps.inc()
        self._labels.inc(step.labels)
        self._tokens.inc(step.tokens)
        self._padding.inc(step.padding)
        self._unpacked.inc(step.unpacked)
        self._seconds.observe(step.seconds)
        if step.checkpoint_seconds is not None:
            self._checkpoint.observe(step.checkpoint_seconds)
