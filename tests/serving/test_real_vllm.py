"""The same promises with vLLM itself: the pod that `control` builds, its containers as processes, and what a kubelet does for them."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from dagger_operator.api import Role, Sampling, Storage, load
from dagger_operator.control.vllm import vllm_command, vllm_environment
from dagger_operator.policy.client import Client
from dagger_operator.policy.metrics import GatewayMetrics
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.streaming import Chunk
from dagger_operator.policy.upstream import Upstream
from dagger_operator.serving.preflight import preflight
from dagger_operator.serving.prepare import prepare
from dagger_operator.serving.publish import publish
from dagger_operator.store.logprobs import TopLogprobs, asked, told
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import pointed, save_policy
from dagger_operator.store.results import PreflightResult, PublishResult, read_result
from dagger_operator.store.stage import Stage

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [{"role": "system", "content": "You repair code."}, {"role": "user", "content": "python3 test.py " * 80}]

_OTHER_SHAPE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
config.intermediate_size = 256
torch.manual_seed(3)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
"""


class ServingPod:
    """Processes of one replica in `folder`, whose path is short."""

    def __init__(self, folder: Path, teacher_url: str) -> None:
        self.folder, self.shared = folder, folder / "s"
        self.shared.mkdir()
        self.address = f"127.{random.randint(20, 250)}.{random.randint(0, 250)}.{random.randint(2, 250)}"
        self.url = f"http://{self.address}:8000"
        source = {"type": "JSONL", "uri": "tasks.jsonl"}
        self.document: dict[str, Any] = {
            "apiVersion": "dagger-operator.dev/v1alpha1",
            "kind": "DAggerRun",
            "metadata": {"name": "real"},
            "spec": {
                "student": {
                    "model": str(folder / "first"),
                    "sampling": {"maxTokens": 16},
                    "serving": {"gpus": 0, "maxModelLen": 2048, "toolCallParser": "hermes", "startupDeadlineSeconds": 300},
                },
                "teacher": {"model": "teacher", "endpoint": {"url": teacher_url}},
                "tasks": {"source": source, "heldOut": {"source": source}},
                "storage": {"url": f"file://{folder}/store"},
            },
        }
        self.run = load(self.document)
        self.environ = {
            "DAGGER_RUN": json.dumps(self.document),
            "DAGGER_ROUND": "0",
            "DAGGER_ROLE": "student",
            "DAGGER_SHARED": str(self.shared),
            "POD_IP": self.address,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.vllm_starts = 0
        self._ended = threading.Event()
        self._kubelet = threading.Thread(target=self._look_after, daemon=True)

    def stage(self, round: int = 0, policy: str = "", **environ: str) -> Stage:
        store = Store.open(Storage(url=self.run.spec.storage.url))
        return Stage(
            run=self.run, round=round, index=0, worker="t", policy=policy, scratch=self.folder / "scratch", store=store, environ=environ
        )

    def start(self) -> None:
        subprocess.run([sys.executable, "-m", "dagger_operator.serving.weights"], env={**os.environ, **self.environ}, check=True)
        self._start_vllm()
        self._start("agent", ["-m", "dagger_operator.serving.agent"], self.environ)
        self._kubelet.start()

    def stop(self) -> None:
        self._ended.set()
        self._kubelet.join()
        for process in self.processes.values():
            _kill(process)

    def _start(self, name: str, arguments: list[str], environ: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments], env={**os.environ, **environ}, stdout=log, stderr=log, start_new_session=True
            )

    def _start_vllm(self) -> None:
        serving = self.run.spec.student.served
        assert serving is not None
        environ = {entry["name"]: entry["value"] for entry in vllm_environment(serving)}
        _, *arguments = [word.replace("$(DAGGER_SHARED)", str(self.shared)) for word in vllm_command(serving)]
        home = {"HOME": os.environ.get("HOME", "/"), "USER": "dagger"}
        self._start("vllm", arguments, {**environ, **home})
        self.vllm_starts += 1

    def _look_after(self) -> None:
        """The vllm container's startup and liveness probe, and its restart policy."""
        started, failures = False, 0
        while not self._ended.wait(0.5):
            well = _status(f"{self.url}/health/server") == 200
            started, failures = started or well, 0 if well else failures + 1
            if self.processes["vllm"].poll() is None and started and failures >= 6:
                _kill(self.processes["vllm"])
            if self.processes["vllm"].poll() is not None:
                started, failures = False, 0
                self._start_vllm()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-6000:]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, as the end of a container ends all of its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _make_student(folder: Path, seed: int) -> None:
    maker = ROOT / "examples" / "quickstart" / "student.py"
    subprocess.run([sys.executable, maker, "--seed", str(seed), "--out", folder], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def served() -> Iterator[ServingPod]:
    """One replica for all tests here, serving r000."""
    folder = Path(tempfile.mkdtemp(prefix="dgr-"))
    teacher_port = random.randint(20000, 30000)
    teacher = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "quickstart" / "teacher.py", "--port", str(teacher_port)], start_new_session=True
    )
    pod = ServingPod(folder, f"http://127.0.0.1:{teacher_port}/v1")
    try:
        _make_student(folder / "first", 1)
        asyncio.run(prepare(pod.stage()))
        pod.start()
        deadline = time.monotonic() + 300
        while _status(f"{pod.url}/health/ready") != 200:
            assert time.monotonic() < deadline, pod.log("vllm") + pod.log("agent")
            time.sleep(0.5)
        yield pod
    finally:
        pod.stop()
        _kill(teacher)
        shutil.rmtree(folder, ignore_errors=True)


async def _chat(http: aiohttp.ClientSession, pod: ServingPod, version: str, **more: Any) -> tuple[int, dict[str, Any]]:
    body = {"model": version, "messages": PROMPT, "max_tokens": 24, "temperature": 0, **more}
    async with http.post(f"{pod.url}/v1/chat/completions", json=body) as answer:
        return answer.status, await answer.json()


async def _version(pod: ServingPod) -> str:
    pointer = await pointed(pod.stage().store)
    assert pointer is not None
    return pointer.policy


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_both_policies_pass_preflight(served: ServingPod) -> None:
    teacher = served.document["spec"]["teacher"]["endpoint"]["url"]
    stage = served.stage(DAGGER_STUDENT_URL=f"{served.url}/v1", DAGGER_TEACHER_URL=teacher)
    await preflight(stage)
    result = await read_result(stage.store, 0, PreflightResult)
    assert result is not None and result.student == await _version(served)
    assert result.checks["student.context"] == "2048 tokens"
    assert result.checks["student.streaming"] == result.checks["teacher.streaming"] == "works"


async def test_an_answer_names_the_version_that_made_it_and_no_other_is_served(served: ServingPod) -> None:
    version = await _version(served)
    async with aiohttp.ClientSession() as http:
        answers = await asyncio.gather(*(_chat(http, served, version) for _ in range(8)))
        assert {(status, answer["model"]) for status, answer in answers} == {(200, version)}
        assert len({_text(answer) for _, answer in answers}) == 1
        assert (await _chat(http, served, "r009-000000000000"))[0] == 404
        assert (await _chat(http, served, "policy"))[0] == 404
        for path in ("/collective_rpc", "/pause", "/tokenize", "/v1/completions", "/openapi.json"):
            assert (await http.post(f"{served.url}{path}", json={})).status in (404, 405)
        metrics = await (await http.get(f"{served.url}/metrics")).text()
        assert "vllm:prefix_cache_queries_total" in metrics and f'dagger_agent_policy_info{{version="{version}"}} 1.0' in metrics


async def test_tool_calls_are_streamed(served: ServingPod) -> None:
    version = await _version(served)
    tool = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {"command": {"enum": ["ls"]}}}}}
    body = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "bash"}}, "stream": True, "max_tokens": 64}
    async with aiohttp.ClientSession() as http:
        request = {"model": version, "messages": PROMPT[:1], **body}
        async with http.post(f"{served.url}/v1/chat/completions", json=request) as answer:
            events = [line[6:] for line in (await answer.text()).splitlines() if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and {chunk["model"] for chunk in chunks} == {version}
    called = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls") or []]
    assert any((call.get("function") or {}).get("name") == "bash" for call in called)


@pytest.mark.parametrize("streamed", [False, True])
async def test_log_probabilities_of_a_label_are_kept_and_are_the_models_own(served: ServingPod, streamed: bool) -> None:
    """Of its whole distribution, whatever temperature and top-p sample from."""
    version, chunks = await _version(served), list[Chunk]()
    teacher = Upstream(
        role=Role.TEACHER,
        urls=(f"{served.url}/v1",),
        token=None,
        model=version,
        version=version,
        sampling=Sampling(temperature=0.7, top_p=0.9, max_tokens=24),
        timeout_seconds=60.0,
        attempts=3,
        served=True,
        top_logprobs=5,
    )
    async with Client(teacher, GatewayMetrics(CollectorRegistry())) as client:
        forward = chunks.append if streamed else None
        answer = await client.complete(ChatRequest(tuple(PROMPT), ()), seed=3, priority=0, affinity="", forward=forward)
    kept = answer.completion.logprobs
    assert kept is not None and (kept.k, len(kept.token_ids)) == (5, answer.completion.completion_tokens)
    assert "token_id:" not in json.dumps([answer.payload, chunks]) and bool(chunks) == streamed
    _assert_the_models_own(served.folder / "first", kept, str(answer.completion.message["content"]))


async def test_the_token_that_ends_a_turn_is_told_too(served: ServingPod) -> None:
    tokenizer = json.loads((served.folder / "first" / "tokenizer.json").read_text())
    end = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    async with aiohttp.ClientSession() as http:
        _, answer = await _chat(http, served, await _version(served), logit_bias={str(end): 100}, **asked(2))
    found = told(answer["choices"][0], 2)
    assert answer["choices"][0]["finish_reason"] == "stop" and found is not None
    assert found.token_ids.tolist() == [end]
    assert found.top_ids.tolist()[0] == end
    _assert_the_models_own(served.folder / "first", found, "")


async def test_weights_change_under_load_and_no_request_is_lost(served: ServingPod) -> None:
    first = await _version(served)
    _make_student(served.folder / "second", 2)
    second = await _publish(served, served.folder / "second", 1, first, wait=False)
    counts = {"lost": 0}

    async def ask_on(http: aiohttp.ClientSession, seen: dict[str, set[str]], until: asyncio.Event) -> None:
        version = first
        while not until.is_set():
            status, answer = await _chat(http, served, version)
            if status == 200:
                seen.setdefault(answer["model"], set()).add(_text(answer))
            elif status in (503, 404):  # not now; another version
                async with http.get(f"{served.url}/policy") as said:
                    version = (await said.json())["version"] or version
                await asyncio.sleep(0.02)
            else:
                counts["lost"] += 1

    async with aiohttp.ClientSession() as http:
        seen: dict[str, set[str]] = {}
        until = asyncio.Event()
        asking = [asyncio.create_task(ask_on(http, seen, until)) for _ in range(16)]
        while first not in seen:
            await asyncio.sleep(0.05)
        stage = served.stage(1, second, DAGGER_AGENT_URL=served.url)
        await publish(stage)
        while second not in seen:
            await asyncio.sleep(0.05)
        until.set()
        await asyncio.gather(*asking)
        # With a salt of its own nothing of a prompt is in the prefix cache: what the cache holds is the new weights'.
        salted = _text((await _chat(http, served, second, cache_salt="fresh"))[1])
    result = await read_result(stage.store, 1, PublishResult)
    assert result is not None and (result.policy, result.replicas) == (second, 1)
    assert (counts["lost"], served.vllm_starts) == (0, 1)
    assert seen.keys() == {first, second} and not seen[first] & seen[second]
    assert seen[second] == {salted}
    async with aiohttp.ClientSession() as http:
        await _assert_probabilities_are_those_of(http, served, second, served.folder / "second")


async def test_weights_that_cannot_be_loaded_in_place_come_by_a_restart(served: ServingPod) -> None:
    parent = await _version(served)
    shutil.copytree(served.folder / "first", served.folder / "third")
    subprocess.run([sys.executable, "-c", _OTHER_SHAPE, served.folder / "third"], check=True)
    third = await _publish(served, served.folder / "third", 2, parent, wait=True)
    assert served.vllm_starts == 2, served.log("agent")
    async with aiohttp.ClientSession() as http:
        status, answer = await _chat(http, served, third)
        assert (status, answer["model"]) == (200, third)
        assert 'dagger_agent_swap_seconds_count{how="Restart"} 1.0' in await (await http.get(f"{served.url}/metrics")).text()


async def test_a_server_that_is_ended_makes_turns_under_way_whole_or_gives_no_answer(served: ServingPod) -> None:
    version, starts, long = await _version(served), served.vllm_starts, 1500
    async with aiohttp.ClientSession() as http:
        asked = [asyncio.create_task(_chat(http, served, version, max_tokens=tokens, ignore_eos=True)) for tokens in [200] + [long] * 31]
        while _running(await (await http.get(f"{served.url}/metrics")).text()) < len(asked):
            await asyncio.sleep(0.02)
        served.processes["vllm"].terminate()  # as a kubelet does: the container's first process
        first, *others = await asyncio.gather(*asked, return_exceptions=True)
        assert not isinstance(first, BaseException), first
        assert (first[0], first[1]["choices"][0]["finish_reason"], first[1]["usage"]["completion_tokens"]) == (200, "length", 200)
        whole = [other for other in others if not isinstance(other, BaseException) and other[0] == 200]
        assert all(answer["usage"]["completion_tokens"] == long for _, answer in whole)
        assert all(isinstance(other, aiohttp.ClientError) or other[0] >= 500 for other in others if other not in whole)
        while _status(f"{served.url}/health/ready") == 200:
            await asyncio.sleep(0.1)
        while _status(f"{served.url}/health/ready") != 200:
            await asyncio.sleep(0.5)
        assert served.vllm_starts == starts + 1 and (await _chat(http, served, version))[0] == 200


def _running(metrics: str) -> int:
    """Requests that vLLM works on."""
    found = re.search(r"^vllm:num_requests_running\{.*\} ([0-9.]+)$", metrics, re.M)
    return int(float(found[1])) if found else 0


async def _assert_probabilities_are_those_of(http: aiohttp.ClientSession, pod: ServingPod, version: str, folder: Path) -> None:
    """Held against transformers on the same weights: an answer alone can hide that a part of the old weights still acts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, answer = await _chat(http, pod, version, max_tokens=1, logprobs=True, top_logprobs=5)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**prompt).logits[0, -1].log_softmax(-1).topk(5).values.tolist()
    given = [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]]
    assert given == pytest.approx(expected, abs=0.05)


def _assert_the_models_own(folder: Path, found: TopLogprobs, text: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.decode(found.token_ids.tolist(), skip_special_tokens=True) == text
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    turn = found.token_ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + turn])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(found.top_ids.tolist()).view(len(turn), found.k))
    assert found.top_logprobs.tolist() == pytest.approx(expected.flatten().tolist(), abs=0.05)


async def _publish(pod: ServingPod, folder: Path, round: int, parent: str, *, wait: bool) -> str:
    store = pod.stage().store
    manifest = await save_policy(store, folder, round=round, base_model="tiny", parent=parent, data_digest=None, settings={}, software={})
    if wait:
        await publish(replace(pod.stage(round, manifest.version), environ={"DAGGER_AGENT_URL": pod.url}))
    return manifest.version
