"""The policy under DeepSpeed: which settings of the resource become which of DeepSpeed's. What it does with each combination of them:
docs/adr/0012-what-deepspeed-does-in-each-layout.md."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed

from dagger_operator.api import Training
from dagger_operator.api.training import REDUCED_AT_ONCE, Offload, Precision
from dagger_operator.store.stage import StageFailure
from dagger_operator.training import adapters, attention, sequence
from dagger_operator.training.loss import Objective


class Engine(Protocol):
    """What training uses of `deepspeed.DeepSpeedEngine`, which is not typed."""

    module: Objective
    policy: Any
    """The module's, whose attributes are the engine's too."""
    optimizer: Any
    """DeepSpeed's own, another class for each ZeRO stage."""
    mpu: Any
    _config: Any

    def __call__(self, *, pieces: int, **row: Any) -> torch.Tensor:
        """The objective of a row, as `rows.collate` gives it."""
        ...

    def train(self) -> object: ...

    def backward(self, loss: torch.Tensor) -> object: ...

    def step(self) -> object: ...

    def was_step_applied(self) -> bool: ...

    def get_global_grad_norm(self) -> float | None: ...

    def zero_optimization_stage(self) -> int: ...

    def save_checkpoint(self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> object: ...

    def load_checkpoint(self, load_dir: str, *, tag: str, load_lr_scheduler_states: bool, load_module_strict: bool = True) -> object: ...


def join(rank: int, ranks: int, local_rank: int) -> torch.device:
    """Enters the process group that the environment names (as torchrun does) and returns this rank's device.

    Raises `StageFailure` (not permanent) where the GPU that it shall have is not there.
    """
    import deepspeed

    # A stage's log is lines of JSON: what DeepSpeed says below an error, and torch about DeepSpeed's calls, only buries them.
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
        # never calls. It takes ops that are not in this table for absent.
        deepspeed.ops.__compatible_ops__ = {}
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    # Ranks wait for the one that uploads a checkpoint or a policy of many gigabytes.
    torch.distributed.init_process_group(backend, init_method="env://", rank=rank, world_size=ranks, timeout=timedelta(hours=1))
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


@contextmanager
def within_memory(rank: int) -> Iterator[None]:
    """Says what to change where a GPU's memory does not do. It would not at the next try either: the same rows come again."""
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
    """DeepSpeed's configuration, for so many groups of ranks that share rows.

    BF16 with ZeRO keeps FP32 master weights with the optimiser's shards; without (stage 0) weights stay in FP32 and are cast as they
    are used. Gradients are summed in FP32 either way, over passes and between ranks; within a pass, where the head is taken in
    pieces, in BF16. By default DeepSpeed reduces between ranks in BF16: half the traffic, of every gradient eight bits, and with ZeRO-1
    of its sum over a whole step.
    """
    stage, bf16 = training.deepspeed.zero_stage, training.precision is Precision.BF16
    # Where DeepSpeed overlaps reduction with the backward pass, memory of a gradient above the bucket is freed, and written to, while it
    # is still being reduced.
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "reduce_bucket_size": REDUCED_AT_ONCE}
    if training.deepspeed.offload is Offload.OPTIMIZER and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": groups,
        "gradient_accumulation_steps": 1,
        # `step()` ends an accumulation window, whatever number of micro-batches it has; the loss is normalised by us.
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
    """AdamW as the resource asks for it; its state starts afresh in every round."""
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
    """The policy in folder `weights`, with an adapter where one is to be trained instead of it, ready to train. Collective."""
    import deepspeed
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not type it; a stage's log is lines of JSON

    low_precision = training.precision is Precision.BF16 and training.deepspeed.zero_stage > 0
    config = AutoConfig.from_pretrained(weights, local_files_only=True)
    groups = sequence.share_rows(config.get_text_config(), training.sequence_parallel)
    # Each rank holds the weights whole, in host memory and then on its GPU, until DeepSpeed shards them: there they have to fit for once.
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
        # DeepSpeed asks `mpu` who shares rows, and from then on takes it for tensor parallelism: BF16 with ZeRO-1 leaves the gradients of
        # all but the first of those ranks out of their norm, and checkpoints call for as many parts of each weight.
        engine.mpu = engine.optimizer.mpu = None
    if low_precision:
        adapters.sharpen(engine, exact)
    engine.train()
    return engine


def gradients_divided_by(engine: Engine, ranks: int, groups: int) -> int:
    """What the engine divides the sum of all ranks' gradients by.

    The ranks that share a row are not to be averaged over; ZeRO-3 does all the same where it scatters what it reduces, as it does by
    default (`__avg_scatter_grads` in `runtime/zero/stage3.py`, 0.19).
    """
    return ranks if engine.zero_optimization_stage() == 3 else groups


def gradient_norm(engine: Engine) -> float | None:
    """Of the last step, before clipping; None where DeepSpeed does not keep it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def take_step(engine: Engine, rate: float) -> bool:
    """Changes the weights by the gradient that the engine holds. Returns whether it was finite: DeepSpeed leaves the step out where it is
    not, and says nothing. Collective; the same on all ranks."""
    if engine.zero_optimization_stage() == 0 and not _finite(engine):
        return False
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.step()
    return bool(engine.was_step_applied())


def _finite(engine: Engine) -> bool:
    """Whether the gradients of all ranks are. Without ZeRO DeepSpeed looks at none, and they are whole on every rank until it steps."""
    gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    finite = torch.nn.utils.get_total_norm(gradients).isfinite().int()
    torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
