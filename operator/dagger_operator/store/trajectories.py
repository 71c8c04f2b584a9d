"""Trajectories as Parquet: one row each, turns as a list of structs; and the part of them that a rerun reproduces.

Messages, tools and tool calls have no fixed schema, so they are stored as JSON strings. States are deltas (`records.Turn.kept`): a row is
O(turns) in size. `datasets.load_dataset("parquet", data_files=...)` reads it; docs/data-format.md describes the columns.
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import cache
from typing import Any

from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.logprobs import TopLogprobs
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.records import Completion, Timings, Trajectory

SCHEMA_VERSION = 1
_VERSION_KEY = b"dagger_schema"
_ROWS_PER_GROUP = 64


@cache
def _schema() -> Any:
    import pyarrow as pa  # tenths of a second to import, and the operator reads no trajectories

    completion = [
        ("message", pa.string()),
        ("policy", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("latency_seconds", pa.float64()),
    ]
    logprobs = pa.struct(
        [
            ("token_ids", pa.list_(pa.int32())),
            ("top_ids", pa.list_(pa.list_(pa.int32()))),
            ("top_logprobs", pa.list_(pa.list_(pa.float32()))),
        ]
    )
    turn = pa.struct(
        [
            ("index", pa.int32()),
            ("actor", pa.string()),
            ("beta", pa.float64()),
            ("coin", pa.float64()),
            ("kept", pa.int32()),
            ("messages", pa.string()),
            ("tools", pa.string()),
            ("action", pa.struct(completion)),
            ("label", pa.struct([*completion, ("logprobs", logprobs)])),
            ("label_flaw", pa.string()),
        ]
    )
    return pa.schema(
        [
            ("run", pa.string()),
            ("round", pa.int32()),
            ("rollout_id", pa.string()),
            ("task_id", pa.string()),
            ("attempt", pa.int32()),
            ("student", pa.string()),
            ("teacher", pa.string()),
            ("kappa", pa.int32()),
            ("turns", pa.list_(turn)),
            ("outcome", pa.string()),
            ("exit_status", pa.string()),
            ("submitted", pa.bool_()),
            ("patch", pa.string()),
            ("failure", pa.struct([("reason", pa.string()), ("message", pa.string())])),
            ("tries", pa.int32()),
            ("worker", pa.string()),
            ("timings", pa.struct([(name, pa.float64()) for name in Timings.model_fields])),
        ],
        metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
    )


def encode(trajectory: Trajectory) -> bytes:
    """Return one trajectory as a Parquet file."""
    return encode_all([trajectory])


def encode_all(trajectories: Sequence[Trajectory]) -> bytes:
    """Return a Parquet file with one row per trajectory; the same trajectories (and pyarrow) give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist([_row(trajectory) for trajectory in trajectories], schema=_schema()),
        sink,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
    )
    return bytes(sink.getvalue())


def decode(data: bytes, key: str) -> Trajectory:
    """Return the trajectory of a file that holds one. Raises `DamagedObject`, which names `key`, for anything else."""
    rows = decode_all(data, key)
    if len(rows) != 1:
        raise DamagedObject(key, f"holds {len(rows)} trajectories instead of 1", _REMEDY)
    return rows[0]


def decode_all(data: bytes, key: str) -> list[Trajectory]:
    """Return the trajectories of a file, in order. Raises `DamagedObject`, which names `key`, if it cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        version = (table.schema.metadata or {}).get(_VERSION_KEY, b"?").decode()
        if version != str(SCHEMA_VERSION):
            raise DamagedObject(
                key, f"has schema version {version}, known here is {SCHEMA_VERSION}", "read it with the version that wrote it"
            )
        return [_trajectory(row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedObject(key, f"is no trajectory file: {type(error).__name__}: {str(error)[:200]}", _REMEDY) from error


_REMEDY = "delete this object and start the stage again: only this rollout is run again (`daggerctl store fsck` lists all such objects)"


def deterministic(trajectory: Trajectory) -> Trajectory:
    """Return what a rerun with the same answers reproduces: no times, latencies, cached tokens, worker, tries or failure messages."""
    failure = trajectory.failure.model_copy(update={"message": ""}) if trajectory.failure else None
    turns = tuple(
        turn.model_copy(update={"action": _timeless(turn.action), "label": _timeless(turn.label) if turn.label else None})
        for turn in trajectory.turns
    )
    return trajectory.model_copy(update={"turns": turns, "failure": failure, "tries": 1, "worker": "", "timings": Timings()})


def canonical(trajectory: Trajectory) -> bytes:
    """Return the deterministic part as canonical JSON (sorted keys, no spaces, UTF-8); data digests are computed from it."""
    fields = deterministic(trajectory).model_dump(mode="json")
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(errors="surrogatepass")


async def write_trajectory(store: Store, kind: Kind, trajectory: Trajectory) -> bool:
    """Put-if-absent: return False if this rollout is already finished; then nothing was written."""
    key = layout.trajectory(trajectory.round, kind, trajectory.rollout_id)
    return await store.create(key, await asyncio.to_thread(encode, trajectory))


async def read_trajectory(store: Store, round_number: int, kind: Kind, rollout_id: str) -> Trajectory:
    """Return one finished rollout. Raises `DamagedObject` if it is missing or unreadable."""
    key = layout.trajectory(round_number, kind, rollout_id)
    found = await store.get(key)
    if found is None:
        raise DamagedObject(key, "is not there", "start the stage again: it runs what is missing")
    return await asyncio.to_thread(decode, found.data, key)


async def read_trajectories(
    store: Store, round_number: int, kind: Kind, *, rollout_ids: Iterable[str] | None = None, concurrency: int = 16
) -> AsyncIterator[Trajectory]:
    """Yield finished rollouts in order of their ids (default: all), with at most `concurrency` of them read ahead into memory."""
    ids = sorted(await finished(store, round_number, kind) if rollout_ids is None else set(rollout_ids))
    ahead: deque[asyncio.Task[Trajectory]] = deque()
    try:
        for rollout_id in ids:
            ahead.append(asyncio.create_task(read_trajectory(store, round_number, kind, rollout_id)))
            if len(ahead) >= concurrency:
                yield await ahead.popleft()
        while ahead:
            yield await ahead.popleft()
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


async def finished(store: Store, round_number: int, kind: Kind) -> frozenset[str]:
    """Return the ids of the rollouts whose trajectories exist."""
    folder = layout.trajectories(round_number, kind)
    return frozenset(info.key.removeprefix(folder).removesuffix(".parquet") for info in await store.list(folder))


def _timeless(completion: Completion) -> Completion:
    return completion.model_copy(update={"cached_tokens": 0, "latency_seconds": 0.0})


def _row(trajectory: Trajectory) -> dict[str, Any]:
    row = trajectory.model_dump(mode="json", exclude={"turns": {"__all__": {"label": {"logprobs"}}}})
    for turn, given in zip(row["turns"], trajectory.turns, strict=True):
        turn["messages"] = _text(turn["messages"])
        turn["tools"] = None if turn["tools"] is None else _text(turn["tools"])
        for completion in (turn["action"], turn["label"]):
            if completion is not None:
                completion["message"] = _text(completion["message"])
        if given.label is not None and given.label.logprobs is not None:
            turn["label"]["logprobs"] = given.label.logprobs.columns()
    return row


def _trajectory(row: dict[str, Any]) -> Trajectory:
    for turn in row["turns"]:
        turn["messages"] = json.loads(turn["messages"])
        turn["tools"] = None if turn["tools"] is None else json.loads(turn["tools"])
        for completion in (turn["action"], turn["label"]):
            if completion is not None:
                completion["message"] = json.loads(completion["message"])
        # Files from before log-probabilities were added lack this column.
        if turn["label"] is not None and (columns := turn["label"].get("logprobs")) is not None:
            turn["label"]["logprobs"] = TopLogprobs.of_columns(columns)
    return Trajectory.model_validate(row)


def _text(value: object) -> str:
    # Escaped to ASCII: tool output may contain lone surrogates, which Parquet's UTF-8 strings cannot.
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
