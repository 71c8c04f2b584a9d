"""How far a stage's workers are: overwritten as they go, for people only."""

import asyncio

from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import Store
from dagger_operator.store.results import StageProgress


async def report(store: Store, round_number: int, stage: str, index: int, progress: StageProgress) -> None:
    """Says how far worker `index` is."""
    await store.put(layout.progress(round_number, stage, index), progress.model_dump_json().encode())


async def read_progress(store: Store, round_number: int, stage: str) -> dict[int, StageProgress]:
    """Progress by worker index; what cannot be read is left out, since nothing rests on it."""
    folder = layout.progresses(round_number, stage)
    keys = [info.key for info in await store.list(folder)]
    found: dict[int, StageProgress] = {}
    for key, entry in zip(keys, await asyncio.gather(*map(store.get, keys)), strict=True):
        if entry is None:
            continue
        try:
            found[int(key.removeprefix(folder).removesuffix(".json"))] = StageProgress.model_validate_json(entry.data)
        except (ValidationError, ValueError):
            continue
    return found
