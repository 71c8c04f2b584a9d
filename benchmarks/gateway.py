"""Measures the latency that the policy gateway adds to a turn, and errors at 512 concurrent rollouts, compared with the LiteLLM proxy.

    python benchmarks/gateway.py [--litellm /path/to/venv/bin/litellm] [--blocks 3]

Every path (direct, gateway, litellm) runs in one process of its own, in front of the same stub upstream, in interleaved blocks of
shuffled order. The stub's delay is a function of the request, so added = measured - delay; `direct` shows what client and stub
themselves add on this machine.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from stub_upstream import service_seconds

from dagger_operator.api import LabelMode, Labels, Mixing, Role, Sampling, Schedule, ScheduleType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.session import SessionRequest
from dagger_operator.policy.upstream import Upstream

HISTORY = [{"role": "user" if i % 2 == 0 else "assistant", "content": "src/module.py:12: def f(x): return x + 1\n" * 50} for i in range(18)]
"""Earlier messages of a rollout: 18 messages, 37 KB."""
ROUTE_KEY = "sk-benchmark"


@dataclass(frozen=True)
class Load:
    name: str
    rollouts: int
    """Concurrently."""
    turns: int
    median_seconds: float


LOADS = (Load("light", 8, 25, 0.2), Load("512 rollouts", 512, 2, 3.0))


@dataclass
class Samples:
    added: list[float] = field(default_factory=list)
    """Milliseconds."""
    errors: int = 0
    seconds: float = 0.0

    def quantile(self, q: float) -> float:
        ordered = sorted(self.added) or [float("nan")]
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def serve_gateway(upstream_url: str, sessions: int) -> None:
    """Run in a child process: print base URL and token of `sessions` open rollouts, then serve them."""

    def upstream(role: Role) -> Upstream:
        version = f"r001-{role.value}"
        return Upstream(role, (upstream_url,), None, version, version, Sampling(), 120.0, 6, True)

    mixing = Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=0.5))
    async with Gateway(upstream(Role.STUDENT), upstream(Role.TEACHER), Labels()) as gateway:
        opened = [
            gateway.open(SessionRequest(0, 1, str(n), str(n), "r001-student", 100, lambda message: None, mixing, LabelMode.DEFERRED))
            for n in range(sessions)
        ]
        print(json.dumps([[session.base_url, session.token] for session in opened]), flush=True)
        await asyncio.Event().wait()


@asynccontextmanager
async def child(*command: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=os.environ | environment, limit=1 << 24
    )
    try:
        yield process
    finally:
        process.terminate()
        await process.wait()


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def litellm_proxy(program: str, upstream_url: str) -> AsyncIterator[str]:
    """Run LiteLLM with one worker, retries and telemetry off, and a master key as in any deployment."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = Path(folder) / "config.json"  # YAML is a superset of JSON
        route = {"model": "openai/policy", "api_base": upstream_url, "api_key": "none"}
        settings = {"num_retries": 0, "telemetry": False, "request_timeout": 120}
        config.write_text(
            json.dumps(
                {
                    "model_list": [{"model_name": "policy", "litellm_params": route}],
                    "litellm_settings": settings,
                    "general_settings": {"master_key": ROUTE_KEY},
                }
            )
        )
        command = (program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
        async with child(*command, LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_LOG="ERROR") as process:
            url = f"http://127.0.0.1:{port}"
            async with aiohttp.ClientSession() as http:
                while process.returncode is None:
                    try:
                        async with http.get(f"{url}/health/liveliness") as response:
                            if response.status == 200:
                                break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.5)
                else:
                    raise SystemExit(f"{program} ended with {process.returncode}: pip install 'litellm[proxy]' beside it")
            yield f"{url}/v1"


async def rollout(http: aiohttp.ClientSession, base_url: str, token: str, load: Load, key: str, samples: Samples) -> None:
    """Request turns as a scaffold does, each state one exchange longer than the last."""
    messages = list(HISTORY)
    # Rollouts of a round are not synchronised.
    await asyncio.sleep(random.Random(key).uniform(0.0, load.median_seconds))
    for turn in range(load.turns):
        turn_key = f"{key}-{turn}"
        messages = [*messages, {"role": "user", "content": f"{turn_key} {load.median_seconds} observation " + "x" * 2000}]
        started = time.perf_counter()
        try:
            async with http.post(
                f"{base_url}/chat/completions", json={"model": "policy", "messages": messages}, headers={"Authorization": f"Bearer {token}"}
            ) as response:
                answer = await response.json()
                message = answer["choices"][0]["message"]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
            samples.errors += 1
            continue
        samples.added.append((time.perf_counter() - started - service_seconds(turn_key, load.median_seconds)) * 1000)
        messages = [*messages, {"role": "assistant", "content": message["content"]}]


async def block(load: Load, number: int, routes: list[tuple[str, str]], samples: Samples) -> None:
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        await asyncio.gather(
            *(rollout(http, url, token, load, f"{number}-{index}", samples) for index, (url, token) in enumerate(routes)),
        )
    samples.seconds += time.perf_counter() - started


Results = dict[tuple[str, str], list[Samples]]
"""By load and path, one entry per block."""


async def measure(litellm: str | None, blocks: int) -> Results:
    results: Results = {}
    async with AsyncExitStack() as stack:
        stub = await first_line(await stack.enter_async_context(child(sys.executable, str(Path(__file__).parent / "stub_upstream.py"))))
        total = (blocks + 1) * sum(load.rollouts for load in LOADS)
        serving = await stack.enter_async_context(child(sys.executable, __file__, "--serve", stub, str(total)))
        sessions = iter(json.loads(await first_line(serving)))
        fixed = {"direct": (stub, "")}
        if litellm:
            fixed["litellm"] = (await stack.enter_async_context(litellm_proxy(litellm, stub)), ROUTE_KEY)
        order = random.Random(0)
        for number in range(blocks + 1):
            for load in LOADS[:1] if number == 0 else LOADS:
                for path in order.sample(paths := ["gateway", *fixed], len(paths)):
                    routes = [fixed.get(path) or tuple(next(sessions)) for _ in range(load.rollouts)]
                    samples = Samples()
                    await block(load, number, routes, samples)
                    if number > 0:  # the first block warms up
                        results.setdefault((load.name, path), []).append(samples)
    return results


def report(results: Results) -> str:
    lines = ["| load | path | p50 ms | p95 ms | p99 ms | over direct p50 ms | errors | requests/s |", "|---|---|---|---|---|---|---|---|"]
    for (load, path), blocks in results.items():
        pooled = Samples([value for block in blocks for value in block.added])
        over = statistics.median(b.quantile(0.5) - d.quantile(0.5) for b, d in zip(blocks, results[load, "direct"], strict=True))
        quantiles = " | ".join(f"{pooled.quantile(q):.1f}" for q in (0.5, 0.95, 0.99))
        rate = len(pooled.added) / sum(block.seconds for block in blocks)
        lines.append(f"| {load} | {path} | {quantiles} | {over:.1f} | {sum(block.errors for block in blocks)} | {rate:.0f} |")
    for load in LOADS:
        if (load.name, "litellm") in results:
            pairs = zip(results[load.name, "litellm"], results[load.name, "gateway"], strict=True)
            ratios = sorted(theirs.quantile(0.5) / ours.quantile(0.5) for theirs, ours in pairs)
            lines.append(f"\n{load.name}: p50 of litellm over p50 of the gateway, block by block: {', '.join(f'{r:.1f}' for r in ratios)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", help="the litellm program of a virtual environment with litellm[proxy]")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--serve", nargs=2, metavar=("UPSTREAM", "SESSIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 16384)), hard))
    if arguments.serve:
        asyncio.run(serve_gateway(arguments.serve[0], int(arguments.serve[1])))
    else:
        print(report(asyncio.run(measure(arguments.litellm, arguments.blocks))))


if __name__ == "__main__":
    main()
