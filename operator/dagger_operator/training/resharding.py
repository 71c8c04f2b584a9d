"""A checkpoint that was cut for another number of ranks: DeepSpeed's universal format, made on the way back only.

Checkpoints are stored as the ranks hold them, which costs nothing. Only when training goes on with another number of ranks is one put
together by parameter, from which any number can take its part. Each of DeepSpeed's optimisers takes it in its own way:
docs/adr/0012-what-deepspeed-does-in-each-layout.md.
"""

import argparse
import contextlib
import io
from pathlib import Path

from dagger_operator.training.engine import Engine


def put_together(cut: Path, whole: Path) -> None:
    """Makes folder `whole` from the files of all ranks in folder `cut`."""
    from deepspeed.checkpoint import ds_to_universal

    whole.mkdir(parents=True, exist_ok=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    # It speaks to a terminal; a stage's log is lines of JSON.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(input_folder=str(cut), output_folder=str(whole), **options))


def load_whole(engine: Engine, folder: Path, tag: str) -> None:
    """Puts what was put together in folder `tag` of `folder` into the engine. Collective."""
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    finally:
        engine._config.load_universal_checkpoint = False
    # DeepSpeed leaves Adam's count of steps on the CPU, where a fused Adam of a GPU cannot take it, and gives ZeRO-3's groups of
    # parameters one count for all, which every group then counts up.
    for weight, state in engine.optimizer.optimizer.state.items():
        state["step"] = state["step"].to(weight.device, copy=True)
