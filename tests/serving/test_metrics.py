"""A real Prometheus scrapes a policy agent through a change of weights: what docs/metrics.md promises, and nothing else."""

import asyncio
from typing import Any

import aiohttp
import pytest


@pytest.mark.heavy
async def test_prometheus_scrapes_an_agent(pod: Any, prometheus: Any, documented_metrics: Any) -> None:
    async with pod.running(), aiohttp.ClientSession() as http:
        prometheus.watch("agent", pod.url.removeprefix("http://"))
        body = {"model": pod.replica.serves.version, "messages": [{"role": "user", "content": "hello"}]}
        async with http.post(f"{pod.url}/v1/chat/completions", json=body) as answer:
            assert answer.status == 200
        pod.target = "r002-cccccccccccc"
        await pod.replica.step()
        async with asyncio.timeout(60):
            while await asyncio.to_thread(prometheus.value, 'dagger_agent_policy_info{version="r002-cccccccccccc"}') != 1:
                await asyncio.sleep(0.2)
        assert await asyncio.to_thread(prometheus.value, 'dagger_agent_swap_seconds_count{how="InPlace"}') == 1
        assert await asyncio.to_thread(prometheus.value, 'dagger_agent_requests_total{code="200"}') == 1
        assert await asyncio.to_thread(prometheus.value, "count(dagger_agent_policy_info)") == 1, "only the version that is served"
        series = await asyncio.to_thread(prometheus.series, "agent")
        assert documented_metrics.differences(series, "Policy agent") == []
        assert any(labels["__name__"].startswith("vllm:") for labels in series), "vLLM's own come with it"
        exposition = pod.metrics.exposition()
    assert await asyncio.to_thread(prometheus.lint, exposition) == ""
