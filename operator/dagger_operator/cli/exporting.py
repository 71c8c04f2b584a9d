"""`daggerctl export`: a round's student or data as plain files."""

import asyncio
import sys
from pathlib import Path

from dagger_operator.cli.exits import Exit
from dagger_operator.cli.storing import stored_run
from dagger_operator.store import layout
from dagger_operator.store.manifest import read_manifest, read_shard
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import load_policy
from dagger_operator.store.results import PrepareResult, TrainingResult, read_result


def export_round(name: str, to: Path, round_number: int | None, what: str) -> int:
    """Writes below `to`; what was exported before and is whole stays."""
    run, store = stored_run(name)
    done = [entry.round for entry in (run.status.rounds if run.status else []) if (entry.training if what == "policy" else entry.rollout)]
    if round_number is None:
        round_number = max(done, default=0)
    match what:
        case "policy":
            return asyncio.run(_policy(store, to, round_number))
        case "data":
            return asyncio.run(_data(store, to, round_number))
    print(f"error: --what: {what!r}: write policy or data", file=sys.stderr)
    return Exit.BAD_INPUT


async def _policy(store: Store, to: Path, number: int) -> int:
    if number == 0:
        prepared = await read_result(store, 0, "prepare", PrepareResult)
        version = prepared.policy if prepared else None
    else:
        trained = await read_result(store, number, "training", TrainingResult)
        version = trained.policy if trained else None
    if version is None:
        print(f"error: --round: {number}: no student was made in that round", file=sys.stderr)
        return Exit.BAD_INPUT
    await load_policy(store, version, to / version)
    print(to / version)
    return Exit.OK


async def _data(store: Store, to: Path, number: int) -> int:
    manifest = await read_manifest(store, number)
    if manifest is None:
        print(f"error: --round: {number}: that round's rollouts are not done", file=sys.stderr)
        return Exit.BAD_INPUT
    for shard in manifest.shards:
        await read_shard(store, number, shard)  # verifies it against its digest
        path = to / f"round-{number:04d}" / f"{shard.digest}.parquet"
        await store.download(layout.shard(number, shard.digest), path)
        print(path)
    return Exit.OK
