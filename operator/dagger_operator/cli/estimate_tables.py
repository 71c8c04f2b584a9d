"""Renders an estimate as tables. Pure, from spec and estimate."""

from collections.abc import Callable
from dataclasses import fields

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagger_operator.api import GpuSharing, RunSpec
from dagger_operator.cli.report import NOTHING, SHOWN
from dagger_operator.estimate import GIB, Estimate, Memory, Pool, RoundEstimate
from dagger_operator.estimate.host import Need
from dagger_operator.estimate.serving import WORKSPACE


def tables(spec: RunSpec, estimate: Estimate) -> RenderableType:
    """Return the whole estimate: totals first, then rounds, memory, findings, and the assumptions."""
    parts = (_headline(spec, estimate), _rounds(estimate), _memory(estimate), _beside(estimate), _findings(estimate), _assumed(estimate))
    return Group(*parts)


def _headline(spec: RunSpec, estimate: Estimate) -> Text:
    shared = spec.gpu_sharing is GpuSharing.TIME_SHARED
    text = Text(f"{estimate.gpus} {estimate.gpu.name} at once ({'time-shared' if shared else 'dedicated'})")
    if estimate.hours is not None and estimate.gpu_hours is not None:
        text.append(f": {estimate.hours:,.1f} hours, {estimate.gpu_hours:,.0f} GPU-hours", style="bold")
    else:
        text.append(": hours are not estimated where a stage works on the CPU")
    if spec.evaluation.initial:
        text.append(f"\nround 0, the evaluation of the initial student: {_hours(estimate.initial_evaluation_seconds)}")
        text.append(f", {_gpu_hours(estimate.initial_evaluation_gpu_hours)} GPU-hours")
    return text


def _rounds(estimate: Estimate) -> Table:
    shown = estimate.rounds[-SHOWN:]
    caption = (
        "teacher calls: one for each state, as label or as turn. as trees, per label: tokens of all steps, as trunks with branches or "
        "as a sequence for each label."
    )
    table = Table(caption=caption, caption_justify="left", caption_style="dim")
    table.add_column("round", no_wrap=True)
    for one in shown:
        table.add_column(str(one.round), justify="right")
    for title, cell in _ROWS:
        table.add_row(title, *(cell(one) for one in shown))
    return table


def _memory(estimate: Estimate) -> Table:
    """A column for each use of a GPU, a row for each component of its memory."""
    columns: dict[str, dict[str, str]] = {}
    if (memory := estimate.training) is not None:
        columns["training"] = {field.name: _gib(getattr(memory, field.name)) for field in fields(memory) if field.name != "host"}
        columns["training"] |= {"all": _gib(memory.total)} | ({"host, for each rank": _gib(memory.host)} if memory.host else {})
    for role, pool in (("student", estimate.student), ("teacher", estimate.teacher)):
        if pool is not None:
            columns[f"{role}, serving"] = _served(pool, estimate)
    table = Table(title=f"GiB of a GPU's {estimate.gpu.memory / GIB:.1f}", title_justify="left")
    table.add_column("memory", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    parts = [field.name for field in fields(Memory) if field.name != "host"]
    for row in (*parts, "KV cache", "all", "host, for each rank", "GPUs", "tokens in KV cache", "whole contexts", "rollouts, all replicas"):
        if any(row in cells for cells in columns.values()):
            table.add_row(row, *(cells.get(row, NOTHING) for cells in columns.values()))
    return table


def _beside(estimate: Estimate) -> Table:
    """What pods need besides GPUs: a column for each kind of pod, a row for each component, totals below their components."""
    pods: dict[str, Need | None] = {
        "training": estimate.training_node,
        "student, serving": estimate.student_pod,
        "teacher, serving": estimate.teacher_pod,
    }
    there = {name: pod for name, pod in pods.items() if pod is not None}
    table = Table(title="GiB of a node in training, and of a pod that serves", title_justify="left")
    table.add_column("memory and disk", no_wrap=True)
    for name in there:
        table.add_column(name, justify="right")
    for title, part in _PARTS:
        if any(hasattr(pod, part) for pod in there.values()):
            table.add_row(title, *(_gib(getattr(pod, part)) if hasattr(pod, part) else NOTHING for pod in there.values()))
    return table


_PARTS = (
    ("processes", "processes"),
    ("labels; twice while ranks exchange them", "labels"),
    ("weights, while they are loaded", "loading"),
    ("optimiser, offloaded", "offloaded"),
    ("weights, gathered for the export", "gathered"),
    ("memory at its fullest", "memory"),
    ("weights on disk", "weights"),
    ("checkpoint", "checkpoint"),
    ("export", "export"),
    ("other", "other"),
    ("ephemeral-storage", "disk"),
    ("  with another number of ranks", "disk_cut_anew"),
)


def _served(pool: Pool, estimate: Estimate) -> dict[str, str]:
    """Values for one replica, except the GPUs and the rollouts; whole contexts are sequences of `maxModelLen`."""
    cache = max(0.0, pool.kv_memory)
    return {
        "weights": _gib(pool.weights),
        "buffers": _gib(WORKSPACE),
        "KV cache": _gib(cache),
        "all": _gib(pool.weights + WORKSPACE + cache),
        "GPUs": f"{pool.gpus}",
        "tokens in KV cache": f"{pool.kv_tokens:,.0f}",
        "whole contexts": f"{pool.whole_contexts:,}",
        "rollouts, all replicas": f"{pool.holds(estimate.mean_state):,}",
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _findings(estimate: Estimate) -> Text:
    if not estimate.findings:
        return Text("Everything fits.", style="green")
    text = Text()
    for finding in estimate.findings:
        text.append("does not fit: " if finding.fatal else "beware: ", style="bold red" if finding.fatal else "bold yellow")
        text.append(f"{finding}\n")
    text.rstrip()
    return text


def _assumed(estimate: Estimate) -> Text:
    numbers = [f"{field.name.replace('_', '-')} {getattr(estimate.assumed, field.name):,}" for field in fields(estimate.assumed)]
    return Text(f"assumed, each an option: {'; '.join(numbers)}. Formulas and sources: docs/estimate.md", style="dim")


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.1f} M"


def _hours(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds / 3600:.2f} h"


def _gpu_hours(hours: float | None) -> str:
    return NOTHING if hours is None else f"{hours:,.1f}"


_ROWS: tuple[tuple[str, Callable[[RoundEstimate], str]], ...] = (
    ("teacher's turns", lambda one: f"{100 * one.teacher_share:.1f} %"),
    ("rollouts", lambda one: f"{one.rollouts:,}"),
    ("teacher calls", lambda one: f"{one.labels:,}"),
    ("  tokens read", lambda one: _millions(one.teacher_prompt_tokens)),
    ("  tokens written", lambda one: _millions(one.teacher_output_tokens)),
    ("student calls", lambda one: f"{one.student_calls:,.0f}"),
    ("steps", lambda one: f"{one.steps:,}"),
    ("  as trees", lambda one: _millions(one.trees.tokens)),
    ("  per label", lambda one: _millions(one.per_label.tokens)),
    ("  fewer by", lambda one: f"{one.saved:.1f} x"),
    ("rollout", lambda one: _hours(one.rollout_seconds)),
    ("  GPU-hours", lambda one: _gpu_hours(one.rollout_gpu_hours)),
    ("training", lambda one: _hours(one.training_seconds)),
    ("  GPU-hours", lambda one: _gpu_hours(one.training_gpu_hours)),
    ("  per label", lambda one: _hours(one.training_seconds_per_label)),
    ("evaluation", lambda one: _hours(one.evaluation_seconds)),
    ("  GPU-hours", lambda one: _gpu_hours(one.evaluation_gpu_hours)),
)
