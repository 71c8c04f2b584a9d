"""`python -m dagger_operator.training` from a closed round to a new policy version, which vLLM serves."""

import asyncio
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dagger_operator.store import layout, logprobs, records
from dagger_operator.store.policies import load_policy
from dagger_operator.store.progress import read_progress
from dagger_operator.store.records import Message, Trajectory
from dagger_operator.store.results import PrepareResult, read_result
from dagger_operator.store.stage import ExitCode
from dagger_operator.training.template import StudentTemplate
from training.stage import STEPS, Setting, healthy, until, vllm

pytestmark = pytest.mark.heavy

LEARNED = r"sed -i '\d+s/\+/\*/' geo\.py"
"""What the teacher says in every state, but for a number."""


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
    base = await read_result(store, 0, PrepareResult)
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


async def test_prometheus_scrapes_a_training(
    policy_folder: Path, trajectories: list[Trajectory], tmp_path: Path, prometheus: Any, documented_metrics: Any
) -> None:
    setting = Setting(tmp_path, steps={"type": "Constant", "value": 10_000})
    await setting.prepare(policy_folder, trajectories)
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"

    async def everything_is_there() -> bool:
        differences = documented_metrics.differences(await asyncio.to_thread(prometheus.series, "trainer"), "Trainer")
        return not differences and bool(await asyncio.to_thread(prometheus.value, "max(dagger_training_steps_total)"))

    with setting.started(POD_IP="127.0.0.2", DAGGER_METRICS_PORT=address.rpartition(":")[2]) as process:
        prometheus.watch("trainer", address)
        await until(everything_is_there, process, 240)
        await until(setting.checkpoints, process)  # three steps are taken
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            exposition = answer.read()
    assert prometheus.lint(exposition) == ""
    said = {sample.name: sample.value for family in text_string_to_metric_families(exposition.decode()) for sample in family.samples}
    steps = said["dagger_training_steps_total"]
    assert said["dagger_training_labels_total"] == 6 * steps and said["dagger_training_progress_ratio"] == steps / 10_000
    assert said["dagger_training_loss"] >= 0 and said["dagger_training_gradient_norm"] >= 0, "0 once these few labels are known by heart"
    assert said["dagger_training_tokens_total"] < said["dagger_training_unpacked_tokens_total"]


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
    with vllm(undisturbed.folder / "vllm.log", str(weights), "--served-model-name", "policy") as (process, url):
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


async def test_a_stage_that_is_done_trains_no_more(undisturbed: Setting) -> None:
    before, said = await undisturbed.result(), undisturbed.log.read_text()
    assert await undisturbed.ended() == ExitCode.DONE
    more = undisturbed.log.read_text().removeprefix(said)
    assert '"event": "already done"' in more
    assert '"event": "training"' in said and '"event": "training"' not in more
    assert await undisturbed.result() == before
