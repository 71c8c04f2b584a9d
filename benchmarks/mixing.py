"""Compares mixing per turn in this project's gateway with mini-swe-agent's RouletteModel, each run twice over the same tasks.

    python benchmarks/mixing.py

Both are the real implementations: the gateway over HTTP in front of a stub policy, and RouletteModel over its own deterministic models.
"""

import asyncio
import os
from fractions import Fraction

import aiohttp
from aiohttp import web

from dagger_operator.api import LabelMode, Labels, Mixing, Role, Sampling, Schedule, ScheduleType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.session import SessionRequest
from dagger_operator.policy.upstream import Upstream

ROLLOUTS, TURNS = 64, 20
BETAS = (0.8, 0.6, 0.37)
Played = list[tuple[str, ...]]
"""Who acted in each turn, by rollout."""


async def complete(http: web.Request) -> web.Response:
    body = await http.json()
    message = {"role": "assistant", "content": f"{body['model']} at {len(body['messages'])}"}
    return web.json_response({"model": body["model"], "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


async def gateway(url: str, beta: float) -> tuple[Played, float]:
    """Run a round of rollouts; return who acted, and labels per visited state."""

    def upstream(role: Role) -> Upstream:
        return Upstream(role, (url,), None, role.value, role.value, Sampling(), 60.0, 6, True)

    async def rollout(server: Gateway, number: int, http: aiohttp.ClientSession) -> tuple[tuple[str, ...], int]:
        session = server.open(
            SessionRequest(0, 1, f"{number:05}", f"task-{number}", "student", TURNS, lambda message: None, mixing, LabelMode.ASYNC)
        )
        messages = [{"role": "user", "content": "task"}]
        headers = {"Authorization": f"Bearer {session.token}"}
        for _ in range(TURNS):
            async with http.post(f"{session.base_url}/chat/completions", json={"messages": messages}, headers=headers) as response:
                answer = await response.json()
            messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": "observation"}]
        turns = (await session.finish()).turns
        return tuple(turn.actor.value for turn in turns), sum(turn.label is not None for turn in turns)

    mixing = Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=beta))
    async with Gateway(upstream(Role.STUDENT), upstream(Role.TEACHER), Labels()) as server, aiohttp.ClientSession() as http:
        played = await asyncio.gather(*(rollout(server, number, http) for number in range(ROLLOUTS)))
    return [actors for actors, _ in played], sum(labels for _, labels in played) / (ROLLOUTS * TURNS)


def roulette(beta: float) -> tuple[Played, float]:
    """Run RouletteModel. It draws uniformly among its models, so copies approximate beta: the nearest fraction of at most ten models."""
    from minisweagent.models.extra.roulette import RouletteModel

    share = Fraction(beta).limit_denominator(10)
    names = ["teacher"] * share.numerator + ["student"] * (share.denominator - share.numerator)
    played = []
    for _ in range(ROLLOUTS):
        outputs = [{"role": "assistant", "content": "x", "extra": {"actions": []}} for _ in range(TURNS)]
        models = [{"model_class": "deterministic", "model_name": name, "outputs": outputs} for name in names]
        model = RouletteModel(model_kwargs=models)
        played.append(tuple(model.query([{"role": "user", "content": "task"}])["model_name"] for _ in range(TURNS)))
    return played, 0.0  # it records no label


def line(name: str, beta: float, first: tuple[Played, float], second: tuple[Played, float]) -> str:
    turns = [actor for actors in first[0] for actor in actors]
    same = sum(a == b for a, b in zip(first[0], second[0], strict=True)) / ROLLOUTS
    return f"| {name} | {beta} | {turns.count('teacher') / len(turns):.3f} | {same:.0%} | {first[1]:.2f} |"


async def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    print("| mixer | beta | delivered share of turns | rollouts mixed the same when played again | labels per visited state |")
    print("|---|---|---|---|---|")
    for beta in BETAS:
        print(line("gateway", beta, await gateway(url, beta), await gateway(url, beta)))
        print(line("RouletteModel", beta, roulette(beta), roulette(beta)))
    await runner.cleanup()


if __name__ == "__main__":
    os.environ |= {"MSWEA_SILENT_STARTUP": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    asyncio.run(main())
