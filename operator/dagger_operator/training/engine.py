"""The policy under DeepSpeed: which settings of the resource become which of DeepSpeed's. How DeepSpeed behaves with each combination:
docs/adr/0012-what-deepspeed-does-in-each-layout.md."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from dagger_operator.api import Training
from dagger_operator.api.training import REDUCED_AT_ONCE, Offload, Precision
from dagger_operator.store.stage import StageFailure
from dagger_operator.training import adapters, attention, sequence
from dagger_operator.training.loss import Objective
from dagger_operator.training.meeting import PATIENCE, meet


class Engine(Protocol):
    """What training uses of `deepspeed.DeepSpeedEngine`, which is untyped."""

    module: Objective
    policy: Any
    """The module's policy: the engine has the attributes of its module."""
    optimizer: Any
    """DeepSpeed's own optimiser, of a different class for each ZeRO stage."""
    mpu: Any
    _config: Any

    def __call__(self, *, pieces: int, **row: Any) -> torch.Tensor:
        """Return the objective of a row from `rows.collate`."""
        ...

    def train(self) -> object: ...

    def backward(self, loss: torch.Tensor) -> object: ...

    def step(self) -> object: ...

    def was_step_applied(self) -> bool: ...

    def get_global_grad_norm(self) -> float | None: ...

    def zero_optimization_stage(self) -> int: ...

    def save_checkpoint(self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> object: ...

    def load_checkpoint(self, load_dir: str, *, tag: str, load_lr_scheduler_states: bool, load_module_strict: bool = True) -> object: ...


def join(rank: int, ranks: int, local_rank: int, training: str) -> torch.device:
    """Join the process group that the environment names (as torchrun sets it) and return this rank's device. `training`: see `meet`.

    Raises `StageFailure` (not permanent) if the rank's GPU is not available, or for a reason of `meet`.
    """
    import deepspeed

    # A stage logs lines of JSON: DeepSpeed's messages below error level, and torch's about DeepSpeed's calls, would only bury them.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    cuda = os.environ.get("DS_ACCELERATOR") == "cuda"
    if cuda and torch.cuda.device_count() <= local_rank:
        raise StageFailure(
            "NoGpu",
            f"rank {rank} shall have GPU {local_rank} of this node and torch finds {torch.cuda.device_count()} that it can use: "
            "training.gpusPerNode must be no less than training.processesPerNode, the node's driver new enough for CUDA "
            f"{torch.version.cuda}, and its libcuda.so.1 in the loader's cache or below LD_LIBRARY_PATH, which is "
            f"{os.environ.get('LD_LIBRARY_PATH', '')!r} (on GKE it must name /usr/local/nvidia/lib64)",
            permanent=False,
        )
    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce at start (half a minute, and a compiler in the image) that training
        # never calls. It treats ops that are not in this table as unavailable.
        deepspeed.ops.__compatible_ops__ = {}
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store = meet(rank, ranks, training)
    # The other ranks wait while one uploads a checkpoint or a policy of many gigabytes.
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


@contextmanager
def within_memory(rank: int) -> Iterator[None]:
    """Report which settings to change if a GPU runs out of memory. A retry would fail too: it computes the same rows."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).partition(". ")[0]
        raise StageFailure(
            "GpuOutOfMemory",
            f"rank {rank}: {told}: lower training.microBatchTokens, set training.activationCheckpointing or training.deepspeed.offload, or "
            "raise training.sequenceParallel (training resumes from its last checkpoint), or raise training.deepspeed.zeroStage (the round "
            "restarts). `daggerctl estimate` says what takes the memory",
        ) from error


def settings(training: Training, groups: int, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's configuration for `groups` groups of ranks that share rows.

    BF16 with ZeRO keeps FP32 master weights with the optimiser's shards; without (stage 0) weights stay in FP32 and are cast on use.
    Gradients are accumulated in FP32 either way, over passes and between ranks; within a pass, if the head is computed in pieces, in
    BF16. By default DeepSpeed reduces between ranks in BF16: half the traffic, but only eight bits of every gradient or, with ZeRO-1, of
    its sum over a whole step.
    """
    stage, bf16 = training.deepspeed.zero_stage, training.precision is Precision.BF16
    # If DeepSpeed overlaps reduction with the backward pass, the memory of a gradient larger than the bucket is freed and overwritten
    # while the gradient is still being reduced.
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": REDUCED_AT_ONCE}
    if training.deepspeed.offload is Offload.OPTIMIZER and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": groups,
        "gradient_accumulation_steps": 1,
        # `step()` ends an accumulation window, whatever its number of micro-batches; `loop` normalises the loss.
        "managed_gradient_accumulation": False,
        "gradient_clipping": training.gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if bf16 and stage > 0:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    elif bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def adamw(training: Training) -> MakeOptimizer:
    """Return the constructor of AdamW with the resource's settings; its state is reset in every round."""
    return functools.partial(
        torch.optim.AdamW,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.weight_decay,
        fused=True,
    )


def build(
    training: Training,
    weights: Path,
    ranks: int,
    device: torch.device,
    make_optimizer: MakeOptimizer,
    adapter: adapters.Adapter | None = None,
) -> Engine:
    """Return the policy in folder `weights` ready to train, with an adapter if that is to be trained instead. Collective."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not type it; a stage's log is lines of JSON

    low_precision = training.precision is Precision.BF16 and training.deepspeed.zero_stage > 0
    config = AutoConfig.from_pretrained(weights, local_files_only=True)
    groups = sequence.share_rows(config.get_text_config(), training.sequence_parallel)
    # Each rank holds the whole weights, in host memory and then on its GPU, until DeepSpeed shards them: they must fit in both.
    policy = AutoModelForCausalLM.from_pretrained(
        weights,
        config=config,
        dtype=torch.bfloat16 if low_precision else torch.float32,
        attn_implementation=attention.NAME,
        local_files_only=True,
    )
    policy.config.use_cache = False
    if training.activation_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    exact = adapters.attach(policy, adapter, weights) if adapter else {}
    objective = Objective(policy)
    engine: Engine
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=make_optimizer([weight for weight in objective.parameters() if weight.requires_grad]),
        config=settings(training, ranks // training.sequence_parallel, device),
        mpu=groups,
    )
    if training.deepspeed.zero_stage > 0:
        # DeepSpeed asks `mpu` which ranks share rows, and afterwards takes it for tensor parallelism: BF16 with ZeRO-1 omits the gradients
        # of all but the first of those ranks from the norm, and checkpoints expect that many partitions of each weight.
        engine.mpu = engine.optimizer.mpu = None
    if low_precision:
        adapters.sharpen(engine, exact)
    engine.train()
    return engine


def gradients_divided_by(engine: Engine, ranks: int, groups: int) -> int:
    """Return the divisor that the engine applies to the sum of all ranks' gradients.

    Ranks that share a row should not be averaged over, but ZeRO-3 does so if it reduce-scatters, as it does by default
    (`__avg_scatter_grads` in `runtime/zero/stage3.py`, 0.19).
    """
    return ranks if engine.zero_optimization_stage() == 3 else groups


def gradient_norm(engine: Engine) -> float | None:
    """Return the gradient norm of the last step, before clipping; None if DeepSpeed does not keep it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def take_step(engine: Engine, rate: float) -> bool:
    """Update the weights by the gradient that the engine holds. Return whether it was finite: if not, DeepSpeed silently skips the step.
    Collective; the same on all ranks."""
    if engine.zero_optimization_stage() == 0 and not _finite(engine):
        return False
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.step()
    return bool(engine.was_step_applied())


def _finite(engine: Engine) -> bool:
    """Whether the gradients of all ranks are finite. Without ZeRO DeepSpeed checks none, and they are unsharded until it steps."""
    gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    finite = torch.nn.utils.get_total_norm(gradients).isfinite().int()
    torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
