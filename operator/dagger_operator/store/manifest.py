"""A round's data set: immutable shards named by their digests, and a manifest that is created once.

Shards hold only the deterministic part of trajectories, so the same data gives the same digests wherever and however often it is
collected. Rollouts that infrastructure broke are left out and counted.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from pydantic import ValidationError

from dagger_operator.api import Aggregation
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.records import Outcome, Record, Trajectory, labelled_states
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.trajectories import (
    SCHEMA_VERSION,
    canonical,
    decode_all,
    deterministic,
    encode_all,
    finished,
    read_trajectories,
)

SHARD_BYTES = 64 << 20
"""Maximum canonical bytes of one shard (a single trajectory may be larger); as Parquet it is a fraction of that."""
SHARD_ROWS = 1024


class Shard(Record):
    """An immutable part of a round's data set."""

    digest: str
    """SHA-256 of the file, and its name."""
    bytes: int
    rows: int


class RoundManifest(Record):
    """A round's data set; created once."""

    schema_version: int
    run: str
    round: int
    rollouts: int
    """Number of trajectories in the shards."""
    turns: int
    labels: int
    """Number of states with a label that can be trained on."""
    excluded: dict[str, int]
    """Number of rollouts that infrastructure broke, by reason; they are in no shard."""
    tasks: tuple[str, ...]
    """Distinct tasks of the trajectories, sorted."""
    policies: tuple[str, ...]
    """Policy versions that acted or labelled, sorted."""
    data_digest: str
    """SHA-256 over the canonical JSON of every trajectory, in order of rollout ids, each preceded by its length in 8 bytes."""
    shards: tuple[Shard, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest as stored."""
        return hashlib.sha256(self.stored()).hexdigest()

    def stored(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


async def close_round(
    store: Store,
    run: str,
    round_number: int,
    expected_ids: Collection[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    shard_rows: int = SHARD_ROWS,
) -> RoundManifest | None:
    """Create the round's data set from its finished rollouts, or return None while some are missing.

    Any number of workers may close a round concurrently: all get the same manifest, as do later calls.
    """
    if (existing := await read_manifest(store, round_number)) is not None:
        return existing
    if not set(expected_ids) <= await finished(store, round_number, Kind.ROLLOUT):
        return None
    closing = _Closing(store, run, round_number, shard_bytes, shard_rows)
    async for trajectory in read_trajectories(store, round_number, Kind.ROLLOUT, rollout_ids=expected_ids):
        await closing.add(trajectory)
    manifest = await closing.manifest()
    if not await store.create(layout.manifest(round_number), manifest.stored()):
        manifest = await read_manifest(store, round_number) or manifest
    return manifest


async def read_manifest(store: Store, round_number: int) -> RoundManifest | None:
    """Return a round's manifest, or None if it is not closed. Raises `DamagedObject` if it cannot be read."""
    key = layout.manifest(round_number)
    found = await store.get(key)
    if found is None:
        return None
    try:
        return RoundManifest.model_validate_json(found.data)
    except ValidationError as error:
        remedy = "delete it and start the round's rollout stage again: it makes the same manifest from the trajectories"
        raise DamagedObject(key, f"is no round manifest: {error.errors()[0]['msg']}", remedy) from error


async def read_shard(store: Store, round_number: int, shard: Shard) -> list[Trajectory]:
    """Return a shard's trajectories, after verifying its digest."""
    key = layout.shard(round_number, shard.digest)
    remedy = (
        "restore it from a copy, or delete it together with the round's manifest.json and results/rollout.json and start the round's "
        "rollout stage again: it makes the same shard from the trajectories"
    )
    found = await store.get(key)
    if found is None:
        raise DamagedObject(key, "is not there although the manifest names it", remedy)
    digest = (await asyncio.to_thread(hashlib.sha256, found.data)).hexdigest()
    if digest != shard.digest:
        raise DamagedObject(key, f"has {len(found.data)} bytes and SHA-256 {digest[:12]}..., not {shard.bytes} and its name's", remedy)
    return await asyncio.to_thread(decode_all, found.data, key)


@dataclass(frozen=True)
class TrainingSet:
    """The data that a round trains on."""

    store: Store
    manifests: tuple[RoundManifest, ...]
    """Ordered by round."""

    @property
    def digest(self) -> str:
        """Digest of all data in the set; for a single round its data digest."""
        if len(self.manifests) == 1:
            return self.manifests[0].data_digest
        return hashlib.sha256("".join(manifest.data_digest for manifest in self.manifests).encode()).hexdigest()

    async def trajectories(self) -> AsyncIterator[Trajectory]:
        """Yield every trajectory, in order of rounds and rollout ids, read shard by shard."""
        async for _, trajectories in self.shards():
            for trajectory in trajectories:
                yield trajectory

    async def shards(self) -> AsyncIterator[tuple[str, list[Trajectory]]]:
        """Yield every shard's key and trajectories, in the same order; each is verified before use."""
        for manifest in self.manifests:
            for shard in manifest.shards:
                yield layout.shard(manifest.round, shard.digest), await read_shard(self.store, manifest.round, shard)


async def training_set(store: Store, round_number: int, aggregation: Aggregation) -> TrainingSet:
    """Return the data that a round trains on: its own (CurrentRoundOnly), or that of all rounds up to it."""
    first = round_number if aggregation is Aggregation.CURRENT_ROUND_ONLY else 1
    rounds = range(first, round_number + 1)
    manifests = await asyncio.gather(*(read_manifest(store, number) for number in rounds))
    for number, manifest in zip(rounds, manifests, strict=True):
        if manifest is None:
            message = f"round {number} has no data set ({layout.manifest(number)} is missing): its rollout stage has to end first"
            raise StageFailure("RoundNotClosed", message, permanent=False)
    return TrainingSet(store, tuple(manifest for manifest in manifests if manifest is not None))


class _Closing:
    """A round's data set under construction, with one shard in memory."""

    def __init__(self, store: Store, run: str, round_number: int, shard_bytes: int, shard_rows: int) -> None:
        self._store, self._run, self._round = store, run, round_number
        self._shard_bytes, self._shard_rows = shard_bytes, shard_rows
        self._pending: list[Trajectory] = []
        self._pending_bytes = 0
        self._digest = hashlib.sha256()
        self._shards: list[Shard] = []
        self._tasks: set[str] = set()
        self._policies: set[str] = set()
        self._excluded: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    async def add(self, trajectory: Trajectory) -> None:
        if trajectory.outcome is Outcome.INFRASTRUCTURE_FAILURE:
            self._excluded[trajectory.failure.reason if trajectory.failure else "Unknown"] += 1
            return
        text = await asyncio.to_thread(canonical, trajectory)
        full = len(self._pending) >= self._shard_rows or self._pending_bytes + len(text) > self._shard_bytes
        if self._pending and full:
            await self._flush()
        self._pending.append(deterministic(trajectory))
        self._pending_bytes += len(text)
        self._digest.update(len(text).to_bytes(8, "big") + text)
        self._tasks.add(trajectory.task_id)
        for turn in trajectory.turns:
            self._policies.update(completion.policy for completion in (turn.action, turn.label) if completion is not None)
        self._counts["rollouts"] += 1
        self._counts["turns"] += len(trajectory.turns)
        self._counts["labels"] += sum(1 for _ in labelled_states(trajectory))

    async def _flush(self) -> None:
        data = await asyncio.to_thread(encode_all, self._pending)
        digest = hashlib.sha256(data).hexdigest()
        await self._store.create(layout.shard(self._round, digest), data)
        self._shards.append(Shard(digest=digest, bytes=len(data), rows=len(self._pending)))
        self._pending, self._pending_bytes = [], 0

    async def manifest(self) -> RoundManifest:
        if self._pending:
            await self._flush()
        return RoundManifest(
            schema_version=SCHEMA_VERSION,
            run=self._run,
            round=self._round,
            rollouts=self._counts["rollouts"],
            turns=self._counts["turns"],
            labels=self._counts["labels"],
            excluded=dict(sorted(self._excluded.items())),
            tasks=tuple(sorted(self._tasks)),
            policies=tuple(sorted(self._policies)),
            data_digest=self._digest.hexdigest(),
            shards=tuple(self._shards),
        )
