"""vLLM as its agent sees it: the server behind a Unix socket, with the development endpoints that are reachable only within this pod."""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp

SERVED_NAME = "policy"
"""`--served-model-name`: vLLM's own name for whatever it serves; only the agent knows versions."""
FRESH = "default"
"""Label of a server that has just started (vLLM's own default)."""
RELOADING = "reloading"
"""Label of a server whose weights may be partly changed."""

_KEPT_ALIVE_SECONDS = 3.0
"""Less than the 5 s after which vLLM closes an idle connection, so that no request uses one that is being closed."""
_QUICK_SECONDS = 10.0
_PROBE: list[dict[str, str]] = [{"role": "user", "content": "ls"}]


class Health(StrEnum):
    UP = "Up"
    DEAD = "Dead"
    """The server answers, but its engine is dead; vLLM does not recover from that."""
    SILENT = "Silent"
    """The server listens, but did not answer in time."""
    AWAY = "Away"
    """Nothing listens: vLLM is starting, or has ended."""


class EngineFailure(Exception):
    """vLLM did not do what it was asked to do."""


class Engine:
    """One vLLM server. Calls raise `EngineFailure` unless stated otherwise; deadlines are in seconds."""

    def __init__(self, socket: Path, *, slow_seconds: float, repacks: bool = False) -> None:
        """`slow_seconds`: deadline of calls that read weights. `repacks`: the worker has `serving.tied_head`, as on the CPU."""
        self._slow_seconds, self._repacks = slow_seconds, repacks
        self.session = aiohttp.ClientSession(
            base_url="http://vllm",
            connector=aiohttp.UnixConnector(str(socket), limit=0, keepalive_timeout=_KEPT_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_QUICK_SECONDS),
            auto_decompress=False,
        )

    @property
    def shows_all_weights(self) -> bool:
        """Whether `fingerprint` covers every tensor. On the CPU vLLM packs linear layers in a form it cannot reach, which leaves embeddings
        and norms: an adapter changes none of those."""
        return not self._repacks

    async def close(self) -> None:
        await self.session.close()

    async def health(self) -> Health:
        try:
            async with self.session.get("/health", timeout=aiohttp.ClientTimeout(total=_QUICK_SECONDS)) as answer:
                return Health.UP if answer.status == 200 else Health.DEAD
        except TimeoutError:
            return Health.SILENT
        except (aiohttp.ClientError, OSError):
            return Health.AWAY

    async def label(self) -> str:
        """Return the label last written by `set_label`; `FRESH` if none was since the server started."""
        return str((await self._call("GET", "/weight_info"))["weight_version"])

    async def set_label(self, label: str) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": label})

    async def pause(self) -> None:
        """Wait for requests in progress, then hold back new ones."""
        await self._call("POST", "/pause?mode=wait", seconds=self._slow_seconds)

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def reload(self, folder: Path) -> None:
        """Replace the weights in place. After a failure the engine is unusable and must be restarted."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self._call("POST", "/collective_rpc", call, seconds=self._slow_seconds)
        if self._repacks:
            await self._call("POST", "/collective_rpc", {"method": "repack_tied_head"}, seconds=self._slow_seconds)

    async def reset_prefix_cache(self) -> None:
        """Discard what earlier weights computed."""
        if not (await self._call("POST", "/reset_prefix_cache")).get("success", True):
            raise EngineFailure("the prefix cache cannot be reset: blocks are still held")

    async def fingerprint(self) -> str:
        """Return a digest of the tensors in memory, as far as they are visible; equal for replicas with the same settings."""
        checksums = (await self._call("POST", "/weight_checker", {"action": "checksum"}, seconds=self._slow_seconds))["checksums"]
        return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]

    async def max_model_len(self) -> int:
        """Return the context length in tokens."""
        return int((await self._call("GET", "/v1/models"))["data"][0]["max_model_len"])

    async def check_chat(self) -> None:
        """Raise if it does not answer, or if it renders a chat differently than it tokenizes it: token counts would be unreliable."""
        counted = int((await self._call("POST", "/tokenize", {"model": SERVED_NAME, "messages": _PROBE}))["count"])
        request = {"model": SERVED_NAME, "messages": _PROBE, "max_tokens": 1, "temperature": 0}
        used = int((await self._call("POST", "/v1/chat/completions", request, seconds=self._slow_seconds))["usage"]["prompt_tokens"])
        if counted != used:
            raise EngineFailure(f"the chat template makes {counted} tokens of a chat that is answered from {used}")

    async def _call(self, method: str, path: str, body: Any = None, *, seconds: float = _QUICK_SECONDS) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self.session.request(method, path, json=body, timeout=timeout) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineFailure(f"{path} answered {answer.status}: {text[:500]}")
                found = json.loads(text)
        except TimeoutError as error:
            raise EngineFailure(f"{path} did not answer within {seconds:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineFailure(f"{path}: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict):
            raise EngineFailure(f"{path} answered no JSON object")
        return found
