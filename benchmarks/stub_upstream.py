"""An OpenAI-compatible server that only waits: the delay is a function of the request, so that a client knows what was added.

python benchmarks/stub_upstream.py    prints its base URL
"""

import asyncio
import math
import random

from aiohttp import web

ANSWER = "I look at the failing test first.\n\n```bash\nsed -n 1,40p src/module.py\n```\n"


def service_seconds(key: str, median: float) -> float:
    """Return a log-normal delay (sigma 0.4), distributed like the length of turns."""
    return median * math.exp(random.Random(key).gauss(0.0, 0.4))


async def complete(http: web.Request) -> web.Response:
    """Answer after a delay. The last message's first two words are the key and the median of its service time in seconds."""
    body = await http.json()
    key, median = body["messages"][-1]["content"].split(" ", 2)[:2]
    await asyncio.sleep(service_seconds(key, float(median)))
    return web.json_response(
        {
            "id": key,
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9000, "completion_tokens": 30, "total_tokens": 9030},
        }
    )


async def main() -> None:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
