"""Killed, interrupted, robbed of a checkpoint or of a node: training goes on to what it would have been."""

import asyncio
import os
import random
import re
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from dagger_operator.store import layout
from dagger_operator.store.policies import policy_manifest
from dagger_operator.store.records import Trajectory
from dagger_operator.store.results import TrainingResult, read_result
from dagger_operator.store.stage import ExitCode
from dagger_operator.training.samples import Sample
from training.stage import Setting, until
from training.steps import LORA, SETTINGS, SHARED, ended_under_deepspeed, made, under_deepspeed

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

Losses = dict[str, tuple[float, ...]]

HALF_WAY = {"batchSize": 9, "steps": {"type": "Constant", "value": 4}, "checkpointEverySteps": 2, "learningRate": 3e-3}
"""The one checkpoint of such a training is what a kill anywhere after it leaves."""
ALONE = ("offload", *(name for name in SETTINGS if "zero" in name and "recompute" not in name))
"""Layouts in which each of two ranks has rows of its own."""


@pytest.fixture(scope="module")
def half_way(policy_folder: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """Where two ranks left each of these layouts, to be copied before it is gone on from, and the losses."""
    folder = tmp_path_factory.mktemp("half-way")
    layouts = {name: {**SETTINGS[name], **HALF_WAY} for name in ALONE}
    return folder, under_deepspeed(2, layouts, policy_folder, samples, folder, adam=True)


def taken(half_way: tuple[Path, Losses], names: Iterable[str], folder: Path) -> Losses:
    """The losses of layouts, which are copied into a folder."""
    left, losses = half_way
    for name in names:
        shutil.copytree(left / name, folder / name)
    return {name: losses[name] for name in names}


async def test_killed_interrupted_and_robbed_of_a_checkpoint_it_ends_with_the_same_losses_and_weights(
    undisturbed: Setting, policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path)
    await setting.prepare(policy_folder, trajectories)

    with setting.started() as process:
        await until(setting.checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    first = await setting.checkpoints()
    assert await read_result(setting.store, 1, TrainingResult) is None

    with setting.started() as process:  # a spot node gives notice while training goes on
        await until(lambda: goes_on(setting, first), process)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 120) == ExitCode.UNAVAILABLE
    assert setting.failure()["reason"] == "Terminated"
    stored = await setting.checkpoints()
    assert stored[-1] > first[0], "the notice was used for a checkpoint"
    assert len(stored) == 2

    files = [info.key for info in await setting.store.list(stored[-1].removesuffix("manifest.json"))]
    damaged = next(key for key in files if not key.endswith("manifest.json"))
    await setting.store.put(damaged, b"cut short")

    setting.seldom()
    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    assert '"why": "damaged"' in setting.log.read_text()
    undisturbed_result, result = await undisturbed.result(), await setting.result()
    assert result.losses == undisturbed_result.losses
    assert result.policy == undisturbed_result.policy
    assert (await policy_manifest(setting.store, result.policy)).files == (await policy_manifest(undisturbed.store, result.policy)).files


@pytest.mark.parametrize(
    ("before", "after", "names", "shared"),
    [
        (2, 1, ALONE, (1, 1)),
        (1, 2, ("zero2", "bf16-zero1"), (1, 1)),
        (2, 1, ("zero0", "zero1", "bf16-zero1", "zero2", "zero3"), (2, 1)),
        (1, 2, ("zero1", "bf16-zero1", "zero2", "zero3"), (1, 2)),
        (2, 2, ("zero1", "bf16-zero1", "zero3"), (1, 2)),
    ],
    ids=["fewer", "more", "fewer that shared rows", "more that share rows", "as many that share rows"],
)
def test_in_every_layout_it_goes_on_with_other_ranks_to_the_same_losses_but_for_rounding(
    before: int,
    after: int,
    names: tuple[str, ...],
    shared: tuple[int, int],
    half_way: tuple[Path, Losses],
    policy_folder: Path,
    samples: list[Sample],
    tmp_path: Path,
) -> None:
    layouts = {name: {**SETTINGS[name], **HALF_WAY, "sequenceParallel": shared[0]} for name in names}
    if (before, shared[0]) == (2, 1):
        undisturbed = taken(half_way, names, tmp_path)
    else:
        undisturbed = under_deepspeed(before, layouts, policy_folder, samples, tmp_path, adam=True)
    change = {"microBatchTokens": 200, "activationCheckpointing": True, "sequenceParallel": shared[1]}
    less = {name: {**settings, **change} for name, settings in layouts.items()}
    found = under_deepspeed(after, less, policy_folder, samples, tmp_path, adam=True, goes_on=True)
    for name in names:
        assert found[name] == pytest.approx(undisturbed[name], rel=2e-3 if "bf16" in name else 1e-5), name


def test_so_it_does_with_the_optimiser_moved_to_host_memory(
    half_way: tuple[Path, Losses], policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    layouts = {name: {**SETTINGS[name], **HALF_WAY} for name in ("zero1", "zero2", "zero3", "bf16-zero2")}
    undisturbed = taken(half_way, layouts, tmp_path)
    less = {name: {**settings, "deepspeed": {**settings["deepspeed"], "offload": "Optimizer"}} for name, settings in layouts.items()}
    found = under_deepspeed(2, less, policy_folder, samples, tmp_path, adam=True, goes_on=True)
    for name in layouts:
        assert found[name] == pytest.approx(undisturbed[name], rel=2e-3 if "bf16" in name else 1e-5), name


def test_so_it_does_where_a_rank_holds_its_part_in_several_groups(policy_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    """As ZeRO-3 does above a billion parameters: here four groups, and the count of Adam's steps is each one's own."""
    layouts, zero = {"zero3": {**SETTINGS["zero3"], **HALF_WAY}}, {"sub_group_size": 20_000}
    undisturbed = under_deepspeed(2, layouts, policy_folder, samples, tmp_path, adam=True, zero=zero)
    found = under_deepspeed(1, layouts, policy_folder, samples, tmp_path, adam=True, zero=zero, goes_on=True)
    assert found["zero3"] == pytest.approx(undisturbed["zero3"], rel=1e-5)


def test_a_notice_to_one_rank_alone_ends_all_with_a_checkpoint_that_another_number_of_ranks_resumes(
    policy_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """In the first step, where there is no state that could be cut for other ranks, without one."""
    layouts = {name: {**SETTINGS[name], **HALF_WAY} for name in ("zero0", "zero1", "zero3", "bf16-zero1", "bf16-zero2")}
    for step, then in ((0, "training restarts"), (3, "training resumes from its checkpoint")):
        for ended in ended_under_deepspeed(2, layouts, policy_folder, samples, tmp_path, adam=True, notice_after=step):
            assert ended == dict.fromkeys(layouts, f"Terminated: asked to end after step {step} of 4; {then}")
    for name in layouts:
        stored = {path.parent.name for path in (tmp_path / name / "store").rglob("manifest.json")}
        assert {tag.rpartition("-")[2] for tag in stored} == {"00000002", "00000003"}
    assert under_deepspeed(1, layouts, policy_folder, samples, tmp_path, adam=True, goes_on=True).keys() == layouts.keys()


def test_adams_count_of_steps_goes_where_its_weights_are(tmp_path: Path) -> None:
    """A fused Adam on a GPU takes it from nowhere else; torch's device without memory stands for one."""
    import torch

    from dagger_operator.training.resharding import load_whole

    count, weights = torch.tensor(2.0), [torch.zeros(3, device="meta") for _ in range(2)]
    adam = SimpleNamespace(state={weight: {"step": count} for weight in weights})
    config = SimpleNamespace(load_universal_checkpoint=False)
    load_whole(SimpleNamespace(_config=config, load_checkpoint=Mock(), optimizer=SimpleNamespace(optimizer=adam)), tmp_path, "whole")
    counts = [state["step"] for state in adam.state.values()]
    assert [one.device.type for one in counts] == ["meta"] * 2 and counts[0] is not counts[1]


@pytest.mark.parametrize(
    "layouts",
    [
        {name: SETTINGS[name] for name in ("bf16-zero1", "bf16-zero2", "bf16-zero3", "offload", "bf16-offload-zero3")},
        {name: SHARED[name] for name in ("shared-zero2", "shared-bf16-zero2")},
        {"adapted-zero2": {**SETTINGS["zero2"], "lora": LORA}},
    ],
    ids=["two ranks", "shared rows", "adapters"],
)
def test_in_bf16_with_shared_rows_and_with_adapters_too_it_ends_with_the_same_losses_and_weights(
    layouts: dict[str, dict[str, Any]],
    half_way: tuple[Path, Losses],
    policy_folder: Path,
    parent: Path,
    samples: list[Sample],
    tmp_path: Path,
) -> None:
    import torch

    layouts = {name: {**settings, **HALF_WAY} for name, settings in layouts.items()}
    given = (2, layouts, policy_folder, samples, tmp_path, parent)
    undisturbed = taken(half_way, layouts, tmp_path) if layouts.keys() <= set(ALONE) else under_deepspeed(*given, adam=True)
    expected = {name: made(tmp_path / name / "policy", "adapted" in name) for name in layouts}
    assert under_deepspeed(*given, adam=True, goes_on=True) == undisturbed
    for name, weights in expected.items():
        resumed = made(tmp_path / name / "policy", "adapted" in name)
        assert all(torch.equal(resumed[key], weights[key]) for key in weights), name


async def test_a_checkpoint_of_another_learning_rate_is_not_gone_on_from(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path, processesPerNode=1, steps={"type": "Constant", "value": 60})
    await setting.prepare(policy_folder, trajectories)
    with setting.started() as process:
        await until(setting.checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    setting.run["spec"]["training"]["learningRate"] = 1e-3
    setting.seldom()
    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    assert '"why": "of another training' in setting.log.read_text()
    assert len((await setting.result()).losses) == 60


async def test_two_nodes_whose_ranks_are_killed_at_any_time_and_one_that_takes_over_train_as_one_undisturbed(
    undisturbed: Setting, policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path, nodes=2, processesPerNode=1, checkpointEverySteps=1)
    await setting.prepare(policy_folder, trajectories)
    chance = random.Random(4)
    for _ in range(2):
        with setting.two_nodes(tmp_path / f"{chance.random()}") as nodes:
            before = await setting.checkpoints()

            async def moves(before: list[str] = before) -> bool:
                return (await setting.checkpoints())[-1:] > before[-1:]

            await until(moves, nodes[0])
            await asyncio.sleep(chance.uniform(0, 0.7))
            (rank,) = psutil.Process(chance.choice(nodes).pid).children()
            rank.kill()
            ended = [await asyncio.to_thread(node.wait, 300) for node in nodes]
        assert ended == [ExitCode.UNAVAILABLE] * 2, setting.log.read_text()[-4000:]
        assert '"PeerLost"' in setting.log.read_text(), "infrastructure pays for the loss of a peer too"
    setting.seldom()
    setting.run["spec"]["training"] |= {"nodes": 1, "processesPerNode": 2}  # the same ranks, dealt otherwise
    before_it = setting.log.read_text()
    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    said = setting.log.read_text().removeprefix(before_it)
    assert re.search(r'"from_step": [1-9]', said), "it did not begin anew"
    assert '"damaged"' not in said and "of another training" not in said, "at most what the kill cut short is given up"
    result, expected = await setting.result(), await undisturbed.result()
    assert result.losses == expected.losses
    made = [await policy_manifest(one.store, (await one.result()).policy) for one in (setting, undisturbed)]
    assert made[0].files == made[1].files, "the weights are the same, bit for bit"


async def test_a_first_node_that_is_lost_while_it_stores_the_policy_is_waited_for(
    undisturbed: Setting, policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path, nodes=2, processesPerNode=1)
    setting.seldom()
    student = shutil.copytree(policy_folder, tmp_path / "student")
    slow = {f"z{number}.txt" for number in range(400)}  # so much to store that somebody can come in between
    for name in slow:
        (student / name).touch()
    await setting.prepare(student, trajectories)
    policies = tmp_path / "store" / layout.policy("r001-")
    with setting.two_nodes(tmp_path / "first") as nodes:
        await until(setting.checkpoints, nodes[0])
        (first,) = psutil.Process(nodes[0].pid).children()
        while not any(path.is_file() for path in policies.parent.glob("r001-*/*")):
            await asyncio.sleep(0.001)
        first.kill()
        ended = [await asyncio.to_thread(node.wait, 300) for node in nodes]
    assert await read_result(setting.store, 1, TrainingResult) is None
    assert ended == [ExitCode.UNAVAILABLE] * 2, "a node that is done would never come again, and the first one wait for it"
    for life in ("second", "third"):  # the third finds the result
        with setting.two_nodes(tmp_path / life) as nodes:
            assert [await asyncio.to_thread(node.wait, 300) for node in nodes] == [ExitCode.DONE] * 2, setting.log.read_text()[-4000:]
    late = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with setting.started("dagger_operator.training.rank", **late) as rank:
        assert await asyncio.to_thread(rank.wait, 120) == ExitCode.DONE, "a node that was made anew meanwhile waits for nobody"
    assert (await setting.result()).losses == (await undisturbed.result()).losses
    made = [await policy_manifest(one.store, (await one.result()).policy) for one in (setting, undisturbed)]
    assert {name: file for name, file in made[0].files.items() if name not in slow} == made[1].files


async def goes_on(setting: Setting, from_checkpoints: list[str]) -> bool:
    """Whether a stage that found a checkpoint has taken steps since."""
    stored = await setting.checkpoints()
    return bool(stored) and stored[-1] > from_checkpoints[-1]
