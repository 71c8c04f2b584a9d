"""`python -m dagger_operator.training` from a closed round to a new policy version: killed, interrupted, resumed, or refused."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dagger_operator.api import Storage
from dagger_operator.store import layout, logprobs, records
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import close_round
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import load_policy, policy_manifest, save_policy
from dagger_operator.store.progress import read_progress
from dagger_operator.store.records import LabelFlaw, Message, Trajectory
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result, save_result
from dagger_operator.store.stage import ExitCode
from dagger_operator.store.trajectories import write_trajectory
from dagger_operator.training.template import StudentTemplate

STEPS = 150
TRAINING = {
    "steps": {"type": "Constant", "value": STEPS},
    "batchSize": 6,
    "batchUnit": "Labels",
    "microBatchTokens": 400,
    "learningRate": 3e-3,
    "precision": "FP32",
    "processesPerNode": 2,
    "gpusPerNode": 0,
    "checkpointEverySteps": 3,
}

LEARNED = r"sed -i '\d+s/\+/\*/' geo\.py"
"""What the teacher says in every state, but for a number."""


class Setting:
    """A run's storage prefix on this machine, and its training stage."""

    def __init__(self, folder: Path, **training: Any) -> None:
        self.folder = folder
        spec = {
            "student": {"model": "tiny"},
            "teacher": {"model": "t", "endpoint": {"url": "http://127.0.0.1:1/v1"}},
            "tasks": {
                "source": {"type": "JSONL", "uri": "tasks.jsonl"},
                "heldOut": {"source": {"type": "JSONL", "uri": "held-out.jsonl"}},
            },
            "storage": {"url": f"file://{folder}/store"},
            "seed": 5,
            "training": {**TRAINING, **training},
        }
        self.run = {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": {"name": "demo"}, "spec": spec}
        self.store = Store.open(Storage(url=spec["storage"]["url"]))
        self.log = folder / "stage.log"
        self.last_words = folder / "last-words.json"

    async def prepare(self, weights: Path, trajectories: list[Trajectory]) -> None:
        made = await save_policy(self.store, weights, round=0, base_model="tiny", parent=None, data_digest=None, settings={}, software={})
        await save_result(self.store, 0, "prepare", PrepareResult(policy=made.version, teacher="t"))
        for trajectory in trajectories:
            await write_trajectory(self.store, Kind.ROLLOUT, trajectory)
        await close_round(self.store, "demo", 1, [trajectory.rollout_id for trajectory in trajectories])

    @contextmanager
    def started(self, **more: str) -> Iterator[subprocess.Popen[bytes]]:
        """The stage, with `more` in its environment, as a process group of its own; nothing of it is left afterwards."""
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)  # lost with the pod
        environ = {
            **os.environ,
            "DAGGER_RUN": json.dumps(self.run),
            "DAGGER_ROUND": "1",
            "DAGGER_SCRATCH": str(self.folder / "scratch"),
            "DAGGER_TERMINATION_LOG": str(self.last_words),
            **more,
        }
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "dagger_operator.training"]
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
            try:
                yield process
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    @contextmanager
    def two_nodes(self, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """A pod on each of two nodes, on which nothing is left of pods before."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master = {"DAGGER_MASTER_ADDR": "127.0.0.1", "DAGGER_MASTER_PORT": f"{probe.getsockname()[1]}", "GLOO_SOCKET_IFNAME": "lo"}
        with ExitStack() as stack:
            nodes = [{"JOB_COMPLETION_INDEX": f"{index}", "DAGGER_SCRATCH": f"{folder / str(index)}"} for index in range(2)]
            yield [stack.enter_context(self.started(**master, **node)) for node in nodes]

    async def ended(self) -> int:
        with self.started() as process:
            return await asyncio.to_thread(process.wait, 600)

    async def result(self) -> TrainingResult:
        found = await read_result(self.store, 1, "training", TrainingResult)
        assert found is not None, self.log.read_text()[-4000:]
        return found

    def failure(self) -> dict[str, str]:
        words: dict[str, str] = json.loads(self.last_words.read_text())
        return words

    async def checkpoints(self) -> list[str]:
        """Manifests of whole checkpoints, oldest first."""
        keys = [info.key for info in await self.store.list(layout.checkpoint_prefix(1))]
        return [key for key in keys if key.endswith("manifest.json")]


async def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert process.poll() is None, "the stage ended before what was waited for"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, trajectories: list[Trajectory]) -> Setting:
    """A training that nothing happened to."""
    setting = Setting(tmp_path_factory.mktemp("undisturbed"))

    async def run() -> None:
        await setting.prepare(policy_folder, trajectories)
        assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]

    asyncio.run(run())
    return setting


@pytest.mark.heavy
async def test_a_round_of_labels_becomes_a_policy_that_has_learned_them(
    undisturbed: Setting, policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    result, store = await undisturbed.result(), undisturbed.store
    summary = result.summary
    assert (summary.steps, summary.labels, len(result.losses)) == (STEPS, STEPS * 6, STEPS)
    assert summary.first_loss is not None and summary.last_loss is not None
    assert summary.last_loss < summary.first_loss / 4
    assert summary.token_ratio > 1
    assert result.policy == summary.checkpoint
    manifest = await load_policy(store, result.policy, tmp_path / "made")
    base = await read_result(store, 0, "prepare", PrepareResult)
    assert base is not None
    assert (manifest.round, manifest.parent, manifest.base_model) == (1, base.policy, "tiny")
    assert manifest.settings["training"]["learningRate"] == 3e-3
    assert {"torch", "deepspeed", "transformers"} <= manifest.software.keys()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (policy_folder / name).read_bytes()
    progress = await read_progress(store, 1, "training")
    assert (progress[0].done, progress[0].total, progress[0].unit) == (STEPS, STEPS, "steps")
    assert await store.list(layout.checkpoint_prefix(1)) == [], "checkpoints of a finished training are only ballast"

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "made"), AutoTokenizer.from_pretrained(tmp_path / "made")
    assert policy.dtype == torch.float32
    state = trajectories[4].turns[0].messages
    prompt = tokenizer.apply_chat_template(list(state), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = policy.generate(**prompt, max_new_tokens=60, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert re.fullmatch(LEARNED + r"<\|im_end\|>", tokenizer.decode(said)), "the student says such things as the teacher, and stops"


@pytest.mark.heavy
async def test_prometheus_scrapes_a_training(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path, prometheus: Any, documented_metrics: Any
) -> None:
    setting = Setting(tmp_path, steps={"type": "Constant", "value": 10_000})
    await setting.prepare(policy_folder, trajectories)
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"

    async def everything_is_there() -> bool:
        return not documented_metrics.differences(await asyncio.to_thread(prometheus.series, "trainer"), "Trainer")

    with setting.started(POD_IP="127.0.0.2", DAGGER_METRICS_PORT=address.rpartition(":")[2]) as process:
        prometheus.watch("trainer", address)
        await until(everything_is_there, process, 120)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            exposition = answer.read()
    assert prometheus.lint(exposition) == ""
    said = {sample.name: sample.value for family in text_string_to_metric_families(exposition.decode()) for sample in family.samples}
    steps = said["dagger_training_steps_total"]
    assert said["dagger_training_labels_total"] == 6 * steps and said["dagger_training_progress_ratio"] == steps / 10_000
    assert said["dagger_training_loss"] >= 0 and said["dagger_training_gradient_norm"] >= 0, "0 once these few labels are known by heart"
    assert said["dagger_training_tokens_total"] < said["dagger_training_unpacked_tokens_total"]


@pytest.mark.heavy
@pytest.mark.timeout(600)
async def test_vllm_serves_the_policy_and_gives_it_the_tokens_that_it_was_trained_on(
    undisturbed: Setting, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    weights = tmp_path / "made"
    await load_policy(undisturbed.store, (await undisturbed.result()).policy, weights)
    template = StudentTemplate(AutoTokenizer.from_pretrained(weights))
    tool = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "bash", "description": "Runs a command"}}
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls -l"}'}}
    states: list[tuple[list[Message], list[dict[str, Any]] | None]] = [
        ([dict(message) for message in messages], None) for _, messages, _ in records.states(trajectories[3])
    ]
    spoken: list[Message] = [
        {"role": "user", "content": [{"type": "text", "text": "list"}, {"type": "text", "text": "files"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "geo.py"},
    ]
    states += [(spoken, [tool]), (spoken[:1], [tool])]
    with vllm(weights, undisturbed.folder / "vllm.log") as (process, url):
        async with aiohttp.ClientSession() as http:
            await until(lambda: healthy(http, url), process, 400)
            for messages, tools in states:
                body = {"model": "policy", "messages": messages, "add_generation_prompt": True} | ({"tools": tools} if tools else {})
                async with http.post(f"{url}/tokenize", json=body) as answer:
                    assert (await answer.json())["tokens"] == template.prompt(messages, tools)
            ask = {"model": "policy", "messages": states[0][0], "temperature": 0, "max_tokens": 60, **logprobs.asked(2)}
            async with http.post(f"{url}/v1/chat/completions", json=ask) as answer:
                said = await answer.json()
    assert re.fullmatch(LEARNED, said["choices"][0]["message"]["content"])
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["prompt_tokens"] == len(template.prompt(*states[0]))
    told, turn = logprobs.told(said["choices"][0], 2), template.label(*states[0], said["choices"][0]["message"])
    assert told is not None and told.token_ids.tolist() == turn, "as a teacher it would give soft targets, the end of the turn included"


@contextmanager
def vllm(weights: Path, log_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(weights), "--served-model-name", "policy"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        await asyncio.sleep(0.5)
        return False


@pytest.mark.heavy
async def test_a_stage_that_is_done_ends_at_once(undisturbed: Setting) -> None:
    before = await undisturbed.result()
    started = time.monotonic()
    assert await undisturbed.ended() == ExitCode.DONE
    assert time.monotonic() - started < 60
    assert await undisturbed.result() == before


@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_killed_interrupted_and_robbed_of_a_checkpoint_it_ends_with_the_same_losses_and_weights(
    undisturbed: Setting, policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path)
    await setting.prepare(policy_folder, trajectories)

    with setting.started() as process:
        await until(setting.checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    first = await setting.checkpoints()
    assert await read_result(setting.store, 1, "training", TrainingResult) is None

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

    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    assert '"why": "damaged"' in setting.log.read_text()
    undisturbed_result, result = await undisturbed.result(), await setting.result()
    assert result.losses == undisturbed_result.losses
    assert result.policy == undisturbed_result.policy
    assert (await policy_manifest(setting.store, result.policy)).files == (await policy_manifest(undisturbed.store, result.policy)).files


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("zero_stage", "before", "after"), [(0, 2, 1), (1, 2, 1), (3, 2, 1), (2, 1, 2)])
async def test_it_goes_on_with_another_number_of_ranks_to_the_same_losses_but_for_rounding(
    zero_stage: int,
    before: int,
    after: int,
    undisturbed: Setting,
    policy_folder: Path,
    trajectories: list[Trajectory],
    tmp_path: Path,
) -> None:
    # Few steps: Adam takes differences in the last digit to the first within some forty.
    few = {"type": "Constant", "value": 25}
    setting = Setting(tmp_path, processesPerNode=before, deepspeed={"zeroStage": zero_stage}, steps=few)
    await setting.prepare(policy_folder, trajectories)
    with setting.started() as process:
        await until(setting.checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    # A node is gone, and what is left has less memory.
    setting.run["spec"]["training"] |= {"processesPerNode": after, "microBatchTokens": 300, "activationCheckpointing": True}
    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    said = setting.log.read_text()
    assert "given up" not in said
    assert ("checkpoint cut anew" in said) == (zero_stage > 0)
    assert re.search(r'"from_step": [1-9]', said), "it did not begin anew"
    result, expected = await setting.result(), await undisturbed.result()
    assert result.losses == pytest.approx(expected.losses[:25], rel=1e-5)


@pytest.mark.heavy
async def test_a_checkpoint_of_another_learning_rate_is_not_gone_on_from(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    setting = Setting(tmp_path, processesPerNode=1, steps={"type": "Constant", "value": 60})
    await setting.prepare(policy_folder, trajectories)
    with setting.started() as process:
        await until(setting.checkpoints, process)
        os.killpg(process.pid, signal.SIGKILL)
    setting.run["spec"]["training"]["learningRate"] = 1e-3
    assert await setting.ended() == ExitCode.DONE, setting.log.read_text()[-4000:]
    assert '"why": "of another training' in setting.log.read_text()
    assert len((await setting.result()).losses) == 60


@pytest.mark.heavy
@pytest.mark.timeout(900)
async def test_two_nodes_whose_ranks_are_killed_at_any_time_train_as_one_undisturbed(
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
        assert ExitCode.UNAVAILABLE in ended, setting.log.read_text()[-4000:]
    with setting.two_nodes(tmp_path / "last") as nodes:
        assert [await asyncio.to_thread(node.wait, 300) for node in nodes] == [ExitCode.DONE] * 2, setting.log.read_text()[-4000:]
    result, expected = await setting.result(), await undisturbed.result()
    assert result.losses == expected.losses
    made = [await policy_manifest(one.store, (await one.result()).policy) for one in (setting, undisturbed)]
    assert made[0].files == made[1].files, "the weights are the same, bit for bit"


async def goes_on(setting: Setting, from_checkpoints: list[str]) -> bool:
    """Whether a stage that found a checkpoint has taken steps since."""
    stored = await setting.checkpoints()
    return bool(stored) and stored[-1] > from_checkpoints[-1]


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
