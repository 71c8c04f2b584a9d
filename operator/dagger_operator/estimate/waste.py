"""Finds what in a run works, but costs much more than necessary."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dagger_operator.api import BatchUnit, RunSpec
from dagger_operator.api.course import spans
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import GIB, Gpu
from dagger_operator.estimate.memory import Setup, training_memory
from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.workload import Conversation, teacher_share


def in_flight(spec: RunSpec, pools: Mapping[str, Pool], talk: Conversation, wanted: Mapping[str, int]) -> Iterator[Finding]:
    """Report rollouts beyond the KV cache: they lose their prefix between turns, and recompute it at each (Concur, arXiv 2601.22705).
    `wanted` is the number in flight at once, by the policy that should keep their prefixes."""
    rollouts = spec.rollouts
    held = {role: pool.holds(talk.mean_state) for role, pool in pools.items()}
    role = max(held, key=lambda role: wanted[role] / max(1, held[role]), default=None)
    if role is None or not 0 < held[role] < wanted[role]:
        return
    beside = role == "student" and any(span.beside is not None for span in spans(spec))
    which = "rollouts, those of an evaluation beside them included," if beside else "rollouts"
    why = (
        f"{wanted[role]} {which} of {talk.mean_state:,.0f} tokens are in flight and the {role}'s servers hold {held[role]}: "
        "prefixes are lost between turns and read again"
    )
    remedy = f"write {max(1, held[role] // (rollouts.workers * (2 if beside else 1)))}, or more replicas"
    if beside and rollouts.workers * rollouts.concurrency <= held[role]:
        remedy += ", or evaluation.overlap: None"
    yield Finding("rollouts.concurrency", f"{rollouts.concurrency} in {rollouts.workers} workers", why, remedy, fatal=False)


def parted(spec: RunSpec, gpu: Gpu, shape: Shape, talk: Conversation) -> Iterator[Finding]:
    """Report trees above `microBatchTokens`: they are split, and each part repeats the trunk."""
    training, setup = spec.training, Setup.of(spec.training)
    share = min(teacher_share(spec.mixing, number, talk.turns) for number in range(1, spec.rounds + 1))
    whole = talk.trees(share, float("inf"))
    parted = talk.trees(share, training.micro_batch_tokens)
    if parted.tokens > 1.25 * whole.tokens:
        wanted = int(-(-whole.tokens // 1024) * 1024)
        longest = max(wanted, training.max_sequence_tokens)
        grown = training_memory(shape, replace(setup, tokens=longest / training.sequence_parallel)).total
        why = f"a trajectory's tree of {whole.tokens:,.0f} tokens is parted into {parted.sequences:.0f}, with {parted.tokens:,.0f} in all"
        takes = f"write {wanted}, which takes {grown / GIB:.1f} GiB of a GPU"
        remedy = takes if grown <= gpu.memory else f"{takes}: too much, so first shard or recompute more"
        yield Finding("training.microBatchTokens", str(training.micro_batch_tokens), why, remedy, fatal=False)


def idle(spec: RunSpec, talk: Conversation) -> Iterator[Finding]:
    """Report steps with fewer trees than there are ranks to compute them."""
    training = spec.training
    groups = training.nodes * training.processes_per_node // training.sequence_parallel
    labels = training.batch_size if training.batch_unit is BatchUnit.LABELS else None
    of_a_trajectory = talk.trees(teacher_share(spec.mixing, 1, talk.turns), training.micro_batch_tokens, labels).sequences
    trajectories = training.batch_size / talk.turns if labels else training.batch_size
    trees = of_a_trajectory * trajectories
    if trees < groups:
        why = f"a step has {max(1, round(trees))} trees for {groups} ranks, and the others wait"
        enough = math.ceil(training.batch_size * groups / max(1.0, trees))
        value = f"{training.batch_size} {training.batch_unit}"
        yield Finding("training.batchSize", value, why, f"write {enough} and as much more learning rate, or take fewer ranks", fatal=False)
