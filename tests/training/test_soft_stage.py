"""A round of soft targets through the training stage, and one that has none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.store.records import Trajectory
from dagger_operator.store.stage import ExitCode
from dagger_operator.training.template import StudentTemplate
from training.conftest import make_tokenizer
from training.stage import Setting
from training.test_soft import told_of

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]


class SoftSetting(Setting):
    def __init__(self, folder: Path, **training: Any) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, loss="ForwardKL", steps={"type": "Constant", "value": 40}, checkpointEverySteps=50, **training)
        self.run["spec"]["labels"] = {"topLogprobs": 2}


async def test_soft_targets_are_learned_alike_however_rows_and_weights_are_spread(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    template = StudentTemplate(make_tokenizer())
    given = [told_of(trajectory, template) if number != 1 else trajectory for number, trajectory in enumerate(trajectories)]
    apart = SoftSetting(tmp_path / "apart", processesPerNode=1, packing="Labels", deepspeed={"zeroStage": 0})
    spread = SoftSetting(
        tmp_path / "spread", processesPerNode=2, sequenceParallel=2, activationCheckpointing=True, deepspeed={"zeroStage": 3}
    )
    losses = []
    for setting in (apart, spread):
        await setting.prepare(policy_folder, given)
        assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
        result = await setting.result()
        assert result.summary.hard_labels == len(trajectories[1].turns) == 1
        assert re.search(r'"hard_labels": 1\b', setting.log.read_text())
        losses.append(result.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert sum(losses[0][-5:]) < sum(losses[0][:5]) / 4


async def test_a_round_without_one_soft_target_is_refused(policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path) -> None:
    setting = SoftSetting(tmp_path / "none", processesPerNode=1)
    await setting.prepare(policy_folder, trajectories)
    assert await setting.ended() == ExitCode.PERMANENT
    assert setting.failure()["reason"] == "NoSoftTargets"
    assert "labels.topLogprobs" in setting.failure()["message"]
