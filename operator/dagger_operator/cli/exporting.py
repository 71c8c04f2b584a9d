"""`daggerctl export`: a round's student or data as plain files."""

import asyncio
import json
import shlex
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from dagger_operator.cli.exits import Exit
from dagger_operator.cli.storing import stored_run
from dagger_operator.local.folder import locked
from dagger_operator.store import layout
from dagger_operator.store.manifest import read_manifest, read_shard
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import load_adapter, load_policy, policy_manifest
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""


def export_round(which: str, to: Path, round_number: int | None, what: str) -> int:
    """Write below `to`; complete earlier exports are kept."""
    if what not in ("policy", "data"):
        print(f"error: --what: {what!r}: write policy or data", file=sys.stderr)
        return Exit.BAD_INPUT
    run, store = stored_run(which)
    return asyncio.run(_exported(store, to, run.spec.rounds, round_number, what))


def export_adapters(which: str, to: Path) -> int:
    """Write the first student below `to` once, each round's adapter beside it, and print how one vLLM serves all of them."""
    run, store = stored_run(which)
    return asyncio.run(_adapters(store, to, run.spec.rounds))


async def _exported(store: Store, to: Path, rounds: int, number: int | None, what: str) -> int:
    export, made = (_policy, _version) if what == "policy" else (_data, read_manifest)
    if number is None:  # the last one in storage: a run from a file may have no status
        number = rounds
        while number > 0 and await made(store, number) is None:
            number -= 1
    return await export(store, to, number)


async def _policy(store: Store, to: Path, number: int) -> int:
    version = await _version(store, number)
    if version is None:
        print(f"error: --round: {number}: no student was made in that round", file=sys.stderr)
        return Exit.BAD_INPUT
    with _alone(to):
        await load_policy(store, version, to / version)
    print(to / version)
    return Exit.OK


async def _adapters(store: Store, to: Path, rounds: int) -> int:
    base, versions = await _version(store, 0), [await _version(store, number) for number in range(1, rounds + 1)]
    made = {version: await policy_manifest(store, version) for version in versions if version is not None}
    adapted = {version: to / "adapters" / version for version, manifest in made.items() if manifest.adapter}
    if base is None or not adapted:
        why = "its rounds train all weights: training.lora makes adapters" if made else "no round of it is trained yet"
        print(f"error: --adapters: the run has none; {why}", file=sys.stderr)
        return Exit.BAD_INPUT
    with _alone(to):
        for version, folder in adapted.items():
            await load_adapter(store, version, folder)
        await load_policy(store, base, to / base)
    rank = max(json.loads((folder / "adapter_config.json").read_text())["r"] for folder in adapted.values())
    command = ["vllm", "serve", str(to / base), "--served-model-name", base, "--enable-lora"]
    # One slot more than adapters: on the CPU, vLLM 0.32 answers for the first student with whatever is in the last slot (vllm #48421).
    command += ["--max-loras", str(len(adapted) + 1)]
    command += ["--max-lora-rank", str(next(size for size in _VLLM_RANKS if size >= rank)), "--lora-modules"]
    print(shlex.join([*command, *(f"{version}={folder}" for version, folder in adapted.items())]))
    return Exit.OK


async def _version(store: Store, number: int) -> str | None:
    """Return the student that a round produced; round 0 is the initial student."""
    if number == 0:
        prepared = await read_result(store, 0, PrepareResult)
        return prepared.policy if prepared else None
    trained = await read_result(store, number, TrainingResult)
    return trained.policy if trained else None


async def _data(store: Store, to: Path, number: int) -> int:
    manifest = await read_manifest(store, number)
    if manifest is None:
        print(f"error: --round: {number}: that round's rollouts are not done", file=sys.stderr)
        return Exit.BAD_INPUT
    with _alone(to):
        for shard in manifest.shards:
            await read_shard(store, number, shard)  # verifies its digest
            path = to / f"round-{number:04d}" / f"{shard.digest}.parquet"
            await store.download(layout.shard(number, shard.digest), path)
            print(path)
    return Exit.OK


def _alone(to: Path) -> AbstractContextManager[None]:
    """Lock the folder: two concurrent exports would delete each other's files."""
    return locked(to / ".daggerctl.lock", f"{to} is being written", "wait until that export is done, or name another folder")
