"""Inputs of the estimate that the resource does not state: how long conversations are, and how well hardware is used."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from dagger_operator.api import InvalidRun, Problem, RunSpec, SourceType


@dataclass(frozen=True)
class Assumptions:
    """Every number that the estimate assumes; each is an option of `daggerctl estimate` and appears in its output."""

    turns: int
    """Turns of a rollout; default half of `scaffold.maxTurns`."""
    first_tokens: int
    """Tokens before the first turn: system, tools, task; default 4,000, at most a sixteenth of `end_tokens`."""
    end_tokens: int
    """Tokens of the conversation at the end of a rollout; default the maximum that training and servers accept."""
    turn_tokens: int
    """Tokens that a policy writes per turn; default 300, at most a third of what a turn adds."""
    held_out: int
    """Tasks of an evaluation; default `tasks.heldOut.count`, or the size of the benchmark."""
    utilisation: float = 0.32
    """Share of peak FLOP/s in training, including recomputation. Source: 26.6 % MFU of prime-rl's Qwen3-4B SFT at 16K on 8 H100 is 32 %
    when attended pairs and recomputation are counted as here."""
    prefill_utilisation: float = 0.4
    """Share of peak FLOP/s of a server in prefill. No source: an assumption."""
    decode_efficiency: float = 0.6
    """Share of memory bandwidth of a server in decoding. No source: an assumption."""
    cached: float = 0.95
    """Share of a known prefix that is still in a server's KV cache if the cache holds all rollouts in flight; otherwise
    proportionally less."""
    command_seconds: float = 5.0
    """Duration of a command in a sandbox. No source: an assumption; measure yours."""
    rollout_seconds: float = 120.0
    """Starting a sandbox and grading, per rollout. No source: an assumption."""
    endpoint_seconds: float = 10.0
    """Duration of a turn of a policy behind an endpoint. No source: an assumption."""
    change_seconds: float = 180.0
    """Starting training, and servers with new weights; if GPUs are time-shared, also restarting servers."""

    @property
    def turn_growth(self) -> float:
        """Tokens by which a turn lengthens the conversation: what was written, and the observation."""
        return (self.end_tokens - self.first_tokens) / self.turns

    @classmethod
    def of(cls, spec: RunSpec, **given: Any) -> Self:
        """Return the defaults for a run, overridden by `given`. Raises `InvalidRun` if values contradict each other or the run."""
        stated = {name: value for name, value in given.items() if value is not None}
        turns = stated.get("turns", max(1, spec.scaffold.max_turns // 2))
        lengths = [spec.training.max_sequence_tokens]
        lengths += [serving.max_model_len for serving in (spec.student.served, spec.teacher.serving) if serving is not None]
        end = stated.get("end_tokens", min(lengths))
        first = stated.get("first_tokens", min(4000, end // 16))
        growth = (end - first) / max(1, turns)
        writes = min(300, spec.student.sampling.max_tokens, max(1, int(growth / 3)))
        defaults = {"turns": turns, "first_tokens": first, "end_tokens": end, "turn_tokens": writes, "held_out": _held_out(spec)}
        made = cls(**{**defaults, **stated})
        made._refuse_nonsense(_most(spec))
        return made

    def _refuse_nonsense(self, most: Mapping[str, tuple[int, str]]) -> None:
        """`most`: the largest value that the run allows, and the field that sets it."""
        seconds = [field.name for field in fields(self) if field.name.endswith("_seconds")]
        problems = [
            Problem(option(field.name), f"got {value}", "write a number above 0")
            for field in fields(self)
            if field.name not in seconds and not 0 < (value := getattr(self, field.name)) < math.inf
        ]
        problems += [
            Problem(option(name), f"got {value}", "this is a share: write a number up to 1")
            for name in ("utilisation", "prefill_utilisation", "decode_efficiency", "cached")
            if 1 < (value := getattr(self, name)) < math.inf
        ]
        problems += [
            Problem(option(name), f"got {value}", "write 0 or more seconds")
            for name in seconds
            if not 0 <= (value := getattr(self, name)) < math.inf
        ]
        problems += [
            Problem(option(name), f"got {value}", f"{field} is {limit}: write at most that, or raise it in the run")
            for name, (limit, field) in most.items()
            if limit < (value := getattr(self, name))
        ]
        if not problems and self.turn_growth < self.turn_tokens:
            least = self.first_tokens + self.turns * self.turn_tokens
            needed = f"{self.turns} turns of {self.turn_tokens} tokens after {self.first_tokens} end at {least}"
            remedy = f"{needed}: write at least that, or fewer --turns"
            problems.append(Problem("--end-tokens", f"got {self.end_tokens}", remedy))
        if problems:
            raise InvalidRun(problems)


def option(name: str) -> str:
    """Return the option of `daggerctl estimate` that sets an assumption."""
    return f"--{name.replace('_', '-')}"


def _most(spec: RunSpec) -> dict[str, tuple[int, str]]:
    """Return the largest number that a run allows for each assumption, and the field that sets it."""
    served = {"student": spec.student.served, "teacher": spec.teacher.serving}
    contexts = [(serving.max_model_len, f"{role}.serving.maxModelLen") for role, serving in served.items() if serving is not None]
    writes = [
        (spec.student.sampling.max_tokens, "student.sampling.maxTokens"),
        (spec.teacher.sampling.max_tokens, "teacher.sampling.maxTokens"),
    ]
    most = {"turns": (spec.scaffold.max_turns, "scaffold.maxTurns"), "turn_tokens": max(writes)}
    if contexts:
        most["end_tokens"] = min(contexts)
    if (count := spec.tasks.held_out.count) is not None:
        most["held_out"] = (count, "tasks.heldOut.count")
    return most


_BENCHMARKS = {SourceType.SWE_BENCH: 500, SourceType.SWE_GYM: 2438}
"""Number of tasks in SWE-bench Verified and in SWE-Gym."""


def _held_out(spec: RunSpec) -> int:
    if spec.tasks.held_out.count is not None:
        return spec.tasks.held_out.count
    source = spec.tasks.held_out.source
    size = _BENCHMARKS.get(source.type, 100)
    if (part := re.search(r"\[(\d*):(\d*)\]", source.split or "")) is not None:
        return max(1, len(range(size)[int(part[1] or 0) : int(part[2] or size)]))
    return size
