"""Rounds of adapters through the training stage: each goes on from the one before, survives what kills it, and is served by itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from dagger_operator.api import TrainingSummary, load
from dagger_operator.local.folder import RunFolder
from dagger_operator.store import layout
from dagger_operator.store.fsck import fsck
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import close_round
from dagger_operator.store.policies import load_policy, policy_manifest, save_policy
from dagger_operator.store.records import Trajectory, states
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result, save_result
from dagger_operator.store.stage import ExitCode
from dagger_operator.store.trajectories import write_trajectory
from training.conftest import dialogue
from training.stage import Setting, healthy, until, vllm

STEPS = 40
LORA = {"rank": 4, "alpha": 16}


class Rounds(Setting):
    """A run whose students are adapters."""

    def __init__(self, folder: Path, **training: Any) -> None:
        settings = {"steps": {"type": "Constant", "value": STEPS}, "learningRate": 1e-2, "lora": LORA, **training}
        super().__init__(folder, **settings)

    async def collect(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            await write_trajectory(self.store, Kind.ROLLOUT, trajectory.model_copy(update={"round": number}))
        await close_round(self.store, "demo", number, [trajectory.rollout_id for trajectory in trajectories])

    async def train(self, number: int) -> str:
        """The version that the round makes."""
        with self.started(DAGGER_ROUND=f"{number}") as process:
            assert await asyncio.to_thread(process.wait, 600) == ExitCode.DONE, self.log.read_text()[-4000:]
        made = await read_result(self.store, number, TrainingResult)
        assert made is not None
        return made.policy


@pytest.fixture(scope="module")
def loud(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student with a head that can say something definite: an adapter leaves the head as it is."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("loud") / "tiny"
    shutil.copytree(policy_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def second_round() -> list[Trajectory]:
    return [dialogue(rollout, turns) for rollout, turns in ((40, 3), (41, 6), (42, 2))]


@pytest.fixture(scope="module")
def two_rounds(
    tmp_path_factory: pytest.TempPathFactory, loud: Path, trajectories: list[Trajectory], second_round: list[Trajectory]
) -> tuple[Rounds, list[str]]:
    """Versions of rounds 0, 1 and 2."""
    run = Rounds(tmp_path_factory.mktemp("two-rounds"), checkpointEverySteps=50)

    async def train() -> list[str]:
        await run.prepare(loud, trajectories)
        await run.collect(2, second_round)
        prepared = await read_result(run.store, 0, PrepareResult)
        assert prepared is not None
        return [prepared.policy, await run.train(1), await run.train(2)]

    return run, asyncio.run(train())


@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_each_round_goes_on_from_the_adapter_before_and_is_the_first_student_plus_its_own(
    two_rounds: tuple[Rounds, list[str]], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    run, (base, first, second) = two_rounds
    folders = [tmp_path / version for version in (base, first, second)]
    for folder in folders:
        await load_policy(run.store, folder.name, folder)
    assert [(await policy_manifest(run.store, version)).parent for version in (base, first, second)] == [None, base, first]
    results = [await read_result(run.store, number, TrainingResult) for number in (1, 2)]
    losses = [result.losses for result in results if result is not None]
    assert losses[0][-1] < losses[0][0] / 4
    assert losses[1][0] < losses[0][0] / 2, "what round 1 learned is there when round 2 begins"
    assert "peft" in (await policy_manifest(run.store, first)).software

    before = load_file(folders[0] / "model.safetensors")
    adapters = []
    for folder in folders[1:]:
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 16, "tiny")
        assert config["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
        adapters.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        merged = load_file(folder / "model.safetensors")
        assert merged.keys() == before.keys()
        for name, weight in merged.items():
            ends = [f"base_model.model.{name.removesuffix('weight')}lora_{kind}.weight" for kind in "AB"]
            if ends[0] in adapters[-1]:
                a, b = (adapters[-1][end] for end in ends)
                torch.testing.assert_close(weight, before[name] + 4 * b @ a, rtol=1e-6, atol=1e-6)
                assert not torch.equal(weight, before[name])
            else:
                assert torch.equal(weight, before[name])
    assert adapters[0].keys() == adapters[1].keys()
    assert all(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.heavy
async def test_fsck_looks_into_the_folder_of_the_adapter(two_rounds: tuple[Rounds, list[str]]) -> None:
    run, versions = two_rounds

    async def policies() -> list[str]:
        return [str(problem) for problem in (await fsck(run.store, deep=True)).problems if problem.key.startswith("policies/r")]

    assert await policies() == []
    key = f"{layout.policy(versions[1])}adapter/adapter_model.safetensors"
    stored = await run.store.get(key)
    assert stored is not None
    await run.store.put(key, stored.data[:-1] + bytes([stored.data[-1] ^ 1]))
    assert [problem.split(": ")[0] for problem in await policies()] == [key]
    await run.store.put(key, stored.data)


@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_one_vllm_serves_every_rounds_student_under_its_own_name(
    two_rounds: tuple[Rounds, list[str]], trajectories: list[Trajectory], second_round: list[Trajectory], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, versions = two_rounds
    RunFolder(tmp_path / "home", "demo").save(load(run.run))
    daggerctl = [sys.executable, "-m", "dagger_operator.cli", "export", "demo", "--adapters", "--to", str(tmp_path / "out")]
    environ = {**os.environ, "DAGGER_HOME": str(tmp_path / "home")}
    command = shlex.split(subprocess.run(daggerctl, env=environ, check=True, capture_output=True, text=True).stdout)
    asked = [[dict(message) for message in next(iter(states(trajectory)))[1]] for trajectory in (trajectories[3], second_round[1])]
    answers: dict[str, list[dict[str, Any]]] = {}
    assert command[:2] == ["vllm", "serve"]
    # The CPU build of vLLM lacks the name by which `vllm serve` asks for its version.
    with vllm(run.folder / "vllm.log", *command[2:]) as (process, url):
        async with aiohttp.ClientSession() as http:
            await until(lambda: healthy(http, url), process, 400)
            async with http.get(f"{url}/v1/models") as answer:
                assert [entry["id"] for entry in (await answer.json())["data"]] == versions

            async def ask(version: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
                body = {"model": version, "messages": messages, "temperature": 0, "max_tokens": 24, "logprobs": True}
                async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
                    return dict((await answer.json())["choices"][0])

            # All at once: one batch holds the rounds side by side.
            every = [(version, messages) for version in versions for messages in asked]
            for (version, _), choice in zip(every, await asyncio.gather(*(ask(*one) for one in every)), strict=True):
                answers.setdefault(version, []).append(choice)

    for version in versions:
        await load_policy(run.store, version, tmp_path / version)
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / version, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / version)
        for messages, choice in zip(asked, answers[version], strict=True):
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            said = policy.generate(**prompt, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
            tokens = said.sequences[0, prompt["input_ids"].shape[1] :]
            assert choice["message"]["content"] == tokenizer.decode(tokens, skip_special_tokens=True), version
            expected = [float(logits[0].log_softmax(-1)[token]) for logits, token in zip(said.logits, tokens, strict=True)]
            assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == pytest.approx(expected, abs=1e-3), version
    said_by = [tuple(choice["message"]["content"] for choice in answers[version]) for version in versions]
    assert len(set(said_by)) == 3, "the rounds' students differ, so each was asked for itself"


@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_killed_it_goes_on_from_a_small_checkpoint_to_the_same_losses(
    two_rounds: tuple[Rounds, list[str]], loud: Path, trajectories: list[Trajectory], second_round: list[Trajectory], tmp_path: Path
) -> None:
    """In the second round, which starts from an adapter, and with fewer ranks than before, which have less memory."""
    undisturbed, _ = two_rounds
    run = Rounds(tmp_path, deepspeed={"zeroStage": 3})
    await run.prepare(loud, trajectories)
    await run.collect(2, second_round)
    first = await read_result(undisturbed.store, 1, TrainingResult)
    assert first is not None
    await save_result(run.store, 1, first)
    for info in await undisturbed.store.list(layout.policy(first.policy)):
        stored = await undisturbed.store.get(info.key)
        assert stored is not None
        await run.store.put(info.key, stored.data)

    async def checkpoints() -> list[str]:
        keys = [info.key for info in await run.store.list(layout.checkpoint_prefix(2))]
        return [key for key in keys if key.endswith("manifest.json")]

    with run.started(DAGGER_ROUND="2") as process:
        await until(checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    files = await run.store.list((await checkpoints())[-1].removesuffix("manifest.json"))
    weights = (loud / "model.safetensors").stat().st_size
    assert sum(info.size for info in files) < weights, "no frozen weight is in it, let alone an optimiser's state of one"
    run.run["spec"]["training"] |= {"processesPerNode": 1, "microBatchTokens": 300, "activationCheckpointing": True}
    run.seldom()
    await run.train(2)
    log = run.log.read_text()
    assert "given up" not in log and "checkpoint resharded" in log
    assert re.search(r'"from_step": [1-7]\b', log), "it did not begin anew, and took most of the steps that are compared"
    results = [await read_result(store, 2, TrainingResult) for store in (run.store, undisturbed.store)]
    losses = [result.losses for result in results if result is not None]
    # Sums in another order differ in the last digit, which Adam takes to the first within some twenty steps.
    assert losses[0][:8] == pytest.approx(losses[1][:8], rel=1e-3)


async def test_a_round_before_without_an_adapter_is_refused(tmp_path: Path, trajectories: list[Trajectory]) -> None:
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "model.safetensors").write_bytes(b"weights")
    run = Rounds(tmp_path)
    await run.prepare(stub, trajectories)
    await run.collect(2, trajectories)
    made_from: dict[str, Any] = {"base_model": "tiny", "parent": None, "data_digest": None, "settings": {}, "software": {}}
    made = await save_policy(run.store, stub, round=1, **made_from)
    summary = TrainingSummary(steps=1, labels=1, tokens=1, checkpoint=made.version, seconds=1)
    await save_result(run.store, 1, TrainingResult(summary=summary, policy=made.version, losses=(1.0,)))
    with run.started(DAGGER_ROUND="2") as process:
        assert await asyncio.to_thread(process.wait, 120) == ExitCode.PERMANENT
    assert run.failure()["reason"] == "NoAdapter" and made.version in run.failure()["message"]
