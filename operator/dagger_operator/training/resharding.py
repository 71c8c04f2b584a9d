"""Loads a checkpoint of another number of ranks: through DeepSpeed's universal format, which is made only when resuming.

Checkpoints are stored as the ranks hold them, which costs nothing. Only if training resumes with another number of ranks is a checkpoint
reassembled by parameter, from which any number of ranks can load their shards. Each of DeepSpeed's optimisers loads it in its own way:
docs/adr/0012-what-deepspeed-does-in-each-layout.md.
"""

import argparse
import contextlib
import io
from pathlib import Path

from dagger_operator.training.engine import Engine


def put_together(cut: Path, whole: Path) -> None:
    """Create folder `whole` from the files of all ranks in folder `cut`."""
    from deepspeed.checkpoint import ds_to_universal

    whole.mkdir(parents=True, exist_ok=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    # It prints to the terminal; a stage logs lines of JSON.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(input_folder=str(cut), output_folder=str(whole), **options))


def load_whole(engine: Engine, folder: Path, tag: str) -> None:
    """Load the reassembled checkpoint in folder `tag` of `folder` into the engine. Collective."""
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    # DeepSpeed leaves Adam's step count on the CPU, where a fused Adam on a GPU cannot use it, and gives ZeRO-3's parameter groups one
    # shared count, which every group then increments.
    for weight, state in engine.optimizer.optimizer.state.items():
        state["step"] = state["step"].to(weight.device, copy=True)
