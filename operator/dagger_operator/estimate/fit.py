"""Finds what in a run does not fit its hardware, and what to write instead."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dagger_operator.api import PodSettings, RunSpec
from dagger_operator.api.context import too_long
from dagger_operator.estimate.finding import Finding
from dagger_operator.estimate.hardware import GIB, Gpu
from dagger_operator.estimate.host import Need, too_little
from dagger_operator.estimate.memory import Memory, Setup, before_sharding, training_memory
from dagger_operator.estimate.models import Shape
from dagger_operator.estimate.serving import Pool
from dagger_operator.estimate.waste import idle, in_flight, parted
from dagger_operator.estimate.workload import Conversation

Change = tuple[str, str, Setup]
"""Field, value to write, and the resulting settings."""


def findings(
    spec: RunSpec,
    gpu: Gpu,
    shape: Shape,
    memory: Memory | None,
    student: Pool | None,
    teacher: Pool | None,
    needs: Iterable[tuple[str, PodSettings, Need]],
    talk: Conversation,
    wanted: Mapping[str, int],
) -> tuple[Finding, ...]:
    """Return all findings, fatal ones first. `needs` are those of pods on GPUs, with the field of their settings; `wanted` is the number of
    concurrent conversations by policy."""
    found = list(_training(spec, gpu, shape, memory)) if memory is not None else []
    pools = {role: pool for role, pool in (("student", student), ("teacher", teacher)) if pool is not None}
    for role, pool in pools.items():
        found += _serving(role, pool)
    found += in_flight(spec, pools, talk, wanted)
    for field, settings, need in needs:
        found += too_little(f"{field}.resources", settings.resources, need)
    if memory is not None:
        found += parted(spec, gpu, shape, talk)
        found += idle(spec, talk)
    return tuple(sorted(found, key=lambda finding: not finding.fatal))


MARGIN = 0.9
"""Share of a GPU's memory that remedies aim at: the formulas are up to an eighth below what others measured (`docs/estimate.md`)."""


def _training(spec: RunSpec, gpu: Gpu, shape: Shape, memory: Memory) -> Iterator[Finding]:
    setup = Setup.of(spec.training)
    sharded = replace(setup, stage=max(1, setup.stage))  # problems without ZeRO are reported below
    if (at_first := before_sharding(shape, sharded)) > gpu.memory:
        value = f"takes {at_first / GIB:.1f} GiB of a GPU's {gpu.memory / GIB:.1f} before the first step"
        why = "every GPU has the weights whole for once, also with ZeRO-3, which shards them then"
        halved = before_sharding(shape, replace(sharded, bf16=True)) <= gpu.memory
        remedy = "write training.precision: BF16" if halved else "take GPUs with more memory, or a smaller student"
        yield Finding("training", value, why, remedy, fatal=True)
        return
    if memory.total <= MARGIN * gpu.memory:
        return
    fits = memory.total <= gpu.memory
    parts = {name: size for name, size in vars(memory).items() if name != "host"}
    largest = max(parts, key=lambda part: parts[part])
    why = f"most of it {largest}, {parts[largest] / GIB:.1f}" + (", and an estimate errs by more than what is left" if fits else "")
    value = f"takes {memory.total / GIB:.1f} GiB of a GPU's {gpu.memory / GIB:.1f}"
    yield Finding("training", value, why, _remedy(spec, gpu, shape), fatal=not fits)


def _remedy(spec: RunSpec, gpu: Gpu, shape: Shape) -> str:
    """Return the first single change that suffices, otherwise several in sequence; those that cost least time come first."""
    room = MARGIN * gpu.memory
    start = Setup.of(spec.training)
    for field, value, setup in _changes(spec, shape, start):
        if training_memory(shape, setup).total <= room:
            return f"write {field}: {value}"
    written: dict[str, str] = {}
    setup = start
    while training_memory(shape, setup).total > room:
        now = training_memory(shape, setup).total
        smaller = (change for change in _changes(spec, shape, setup) if training_memory(shape, change[2]).total < now)
        if (change := next(smaller, None)) is None:
            return f"no settings fit {shape.parameters / 1e9:.1f} billion parameters: take GPUs with more memory, or more of them"
        field, value, setup = change
        written[field] = value
    return "write " + ", ".join(f"{field}: {value}" for field, value in written.items())


def _changes(spec: RunSpec, shape: Shape, now: Setup) -> Iterator[Change]:
    training = spec.training
    for stage in range(max(1, now.stage + 1), 4):
        if now.ranks > 1:
            yield "training.deepspeed.zeroStage", str(stage), replace(now, stage=stage)
    if not now.checkpointing:
        yield "training.activationCheckpointing", "true", replace(now, checkpointing=True)
    if now.tokens > training.max_sequence_tokens:
        yield "training.microBatchTokens", str(training.max_sequence_tokens), replace(now, tokens=training.max_sequence_tokens)
    whole = max(training.micro_batch_tokens, training.max_sequence_tokens)
    for share in (2, 4, 8):
        if training.processes_per_node % share == 0 and shape.heads % share == 0 and whole / share < now.tokens:
            yield "training.sequenceParallel", str(share), replace(now, tokens=whole / share)
    if now.stage > 0 and not now.offload:
        yield "training.deepspeed.offload", "Optimizer", replace(now, offload=True)
    for nodes in (2, 4, 8):
        ranks = nodes * training.nodes * training.processes_per_node
        if ranks > now.ranks and now.stage > 0:
            yield "training.nodes", str(nodes * training.nodes), replace(now, ranks=ranks)


def _serving(role: str, pool: Pool) -> Iterator[Finding]:
    serving, shape = pool.serving, pool.shape
    field = f"{role}.serving"
    if shape.heads % serving.gpus:
        fitting = max(gpus for gpus in range(1, serving.gpus) if shape.heads % gpus == 0)
        yield Finding(f"{field}.gpus", str(serving.gpus), f"{shape.heads} heads cannot be shared out to as many", f"write {fitting}")
    if (found := too_long(serving, {"max_position_embeddings": shape.positions}, trained=role == "student")) is not None:
        why = f"the model's own context is {found.longest} tokens, and vLLM refuses more"
        yield Finding(f"{field}.maxModelLen", str(serving.max_model_len), why, found.remedy)
    if pool.whole_contexts == 0:
        yield _too_small(field, pool)


def _too_small(field: str, pool: Pool) -> Finding:
    """Return the finding for a KV cache that cannot hold one sequence of `maxModelLen`: vLLM would not start."""
    asked = pool.serving.max_model_len
    room = f"beside {pool.weights / GIB:.1f} GiB of weights a GPU has room for {pool.kv_tokens:,.0f} tokens"
    why = f"{room}, and one sequence may have {asked:,}"
    sizes = [gpus for gpus in (2, 4, 8, 16) if gpus > pool.serving.gpus and pool.shape.heads % gpus == 0]
    wider = (replace(pool, serving=pool.serving.model_copy(update={"gpus": gpus})) for gpus in sizes)
    enough = next((wide for wide in wider if wide.whole_contexts > 0), None)
    remedies = [f"write {field}.gpus: {enough.serving.gpus}"] if enough else []
    if pool.kv_tokens >= 1024:
        remedies.append(f"write {field}.maxModelLen: {int(pool.kv_tokens // 1024 * 1024)}")
    if not remedies:
        return Finding(f"{field}.gpus", str(pool.serving.gpus), why, "take GPUs with more memory")
    return Finding(f"{field}.maxModelLen", str(asked), why, " or ".join(remedies))
