"""What training cannot learn from ends the stage with a reason, and never reaches the weights."""

import re
import shutil
from pathlib import Path

import pytest

from dagger_operator.store import layout
from dagger_operator.store.records import LabelFlaw, Trajectory
from dagger_operator.store.stage import ExitCode, StageFailure
from training.stage import Setting


@pytest.mark.heavy
async def test_a_loss_that_is_no_number_ends_the_stage_before_it_reaches_the_weights(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(policy_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    setting = Setting(tmp_path, processesPerNode=1)
    await setting.prepare(broken, trajectories)
    assert await setting.ended() == ExitCode.PERMANENT
    assert setting.failure()["reason"] == "LossNotFinite"
    assert "training.learningRate" in setting.failure()["message"]
    (shard,) = [info.key for info in await setting.store.list(f"{layout.round_prefix(1)}/data/")]
    assert setting.failure()["message"].endswith(f"in shards {shard}")


@pytest.mark.heavy
async def test_a_damaged_shard_is_named_and_never_trained_on(policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path) -> None:
    setting = Setting(tmp_path, processesPerNode=1)
    await setting.prepare(policy_folder, trajectories)
    shard = next(info.key for info in await setting.store.list(f"{layout.round_prefix(1)}/data/"))
    await setting.store.put(shard, b"PAR1")
    assert await setting.ended() == ExitCode.PERMANENT
    assert setting.failure()["reason"] == "DamagedObject"
    assert shard in setting.failure()["message"]


async def test_without_labels_the_stage_says_where_to_look(
    policy_folder_stub: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    def unlabelled(trajectory: Trajectory) -> Trajectory:
        turns = (turn.model_copy(update={"label_flaw": LabelFlaw.TRUNCATED}) for turn in trajectory.turns)
        return trajectory.model_copy(update={"turns": tuple(turns)})

    setting = Setting(tmp_path)
    await setting.prepare(policy_folder_stub, [unlabelled(trajectory) for trajectory in trajectories])
    assert await setting.ended() == ExitCode.PERMANENT
    assert setting.failure()["reason"] == "NoLabels"
    assert "label_flaw" in setting.failure()["message"]


async def test_a_round_that_is_not_closed_is_waited_for(policy_folder_stub: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    assert await setting.ended() == ExitCode.UNAVAILABLE
    assert setting.failure()["reason"] == "RoundNotClosed"


async def test_weights_cut_short_in_the_store_are_named(policy_folder_stub: Path, trajectories: list[Trajectory], tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    await setting.prepare(policy_folder_stub, trajectories)
    weights = next(info.key for info in await setting.store.list("policies/") if info.key.endswith(".safetensors"))
    await setting.store.put(weights, b"1")
    assert await setting.ended() == ExitCode.PERMANENT
    assert setting.failure()["reason"] == "DamagedObject"
    assert weights in setting.failure()["message"]


@pytest.fixture
def policy_folder_stub(tmp_path: Path) -> Path:
    """Files for stages that end before anybody reads them as a policy."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.heavy
def test_a_gpu_that_is_too_small_or_not_there_is_named_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dagger_operator.training import engine

    told = "GpuOutOfMemory: rank 3: CUDA out of memory: lower training.microBatchTokens"
    with pytest.raises(StageFailure, match=told) as small, engine.within_memory(3):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert small.value.permanent
    stays, anew = str(small.value).split("(training resumes from its last checkpoint)")
    assert "training.deepspeed.offload" in stays and "training.sequenceParallel" in stays
    assert "zeroStage" not in stays and re.search(r"training\.deepspeed\.zeroStage \(the round restarts\)", anew)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    there = torch.cuda.device_count()
    told = f"NoGpu: rank {there} shall have GPU {there} .* torch finds {there} .*LD_LIBRARY_PATH.*lib64"
    with pytest.raises(StageFailure, match=told) as missing:
        engine.join(there, there + 1, there, "test")
    assert not missing.value.permanent
