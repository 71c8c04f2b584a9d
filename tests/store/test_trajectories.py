"""Trajectories come back as they were, whatever models and tools print, and reruns agree on their deterministic part."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.logprobs import TopLogprobs
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.records import Trajectory
from dagger_operator.store.trajectories import (
    canonical,
    decode,
    decode_all,
    encode,
    encode_all,
    finished,
    read_trajectories,
    read_trajectory,
    write_trajectory,
)

Make = Callable[..., Trajectory]
thorough = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(data=st.data())
def test_any_trajectory_comes_back_as_it_was(made_up: st.SearchStrategy[Trajectory], data: st.DataObject) -> None:
    trajectory = data.draw(made_up)
    assert decode(encode(trajectory), "key") == trajectory


@thorough
@given(data=st.data())
def test_a_shard_keeps_order_and_its_bytes_depend_on_nothing_else(made_up: st.SearchStrategy[Trajectory], data: st.DataObject) -> None:
    several = data.draw(st.lists(made_up, min_size=1, max_size=3))
    assert decode_all(encode_all(several), "key") == several
    assert encode_all(several) == encode_all(decode_all(encode_all(several), "key"))


@thorough
@given(data=st.data())
def test_any_trajectory_has_a_canonical_form_that_storage_does_not_change(
    made_up: st.SearchStrategy[Trajectory], data: st.DataObject
) -> None:
    trajectory = data.draw(made_up)
    assert canonical(decode(encode(trajectory), "key")) == canonical(trajectory)
    json.loads(canonical(trajectory).decode(errors="surrogatepass"))


def test_a_rerun_on_another_worker_has_the_same_canonical_form(rollout: Make) -> None:
    first, again = rollout("r"), rollout("r")
    assert first != again and canonical(first) == canonical(again)


@pytest.mark.parametrize("change", [{"task_id": "task-2"}, {"patch": "diff"}, {"attempt": 1}, {"turns": 2}, {"submitted": True}])
def test_whatever_an_agent_did_differently_changes_the_canonical_form(rollout: Make, change: dict[str, object]) -> None:
    assert canonical(rollout("r")) != canonical(rollout("r", **change))


def test_size_grows_with_turns_and_not_with_their_square(rollout: Make) -> None:
    # Incompressible, so that repetition would show.
    short, long = (len(encode(_noisy(rollout, turns))) for turns in (50, 200))
    assert long < 5 * short


def _noisy(rollout: Make, turns: int) -> Trajectory:
    import random

    dice = random.Random(0)
    trajectory = rollout("r", turns=turns)
    noise = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=400)) for _ in trajectory.turns]
    changed = [
        turn.model_copy(update={"messages": ({"role": "user", "content": text},)})
        for turn, text in zip(trajectory.turns, noise, strict=True)
    ]
    return trajectory.model_copy(update={"turns": tuple(changed)})


async def test_a_finished_rollout_is_written_once_and_stays(store: Store, rollout: Make) -> None:
    first = rollout("r")
    assert await write_trajectory(store, Kind.ROLLOUT, first)
    assert not await write_trajectory(store, Kind.ROLLOUT, rollout("r"))
    assert await read_trajectory(store, 1, Kind.ROLLOUT, "r") == first
    assert await finished(store, 1, Kind.ROLLOUT) == {"r"}
    assert await finished(store, 1, Kind.EVALUATION) == frozenset()


async def test_all_of_a_stage_are_read_in_order_however_few_at_a_time(store: Store, rollout: Make) -> None:
    ids = [f"{number:04d}" for number in range(23)]
    for rollout_id in reversed(ids):
        await write_trajectory(store, Kind.EVALUATION, rollout(rollout_id))
    for concurrency in (1, 4, 100):
        assert [t.rollout_id async for t in read_trajectories(store, 1, Kind.EVALUATION, concurrency=concurrency)] == ids
    assert [t.rollout_id async for t in read_trajectories(store, 1, Kind.EVALUATION, rollout_ids=["0007", "0002"])] == ["0002", "0007"]


async def test_a_damaged_file_is_named_with_what_to_do(store: Store, rollout: Make) -> None:
    key = layout.trajectory(1, Kind.ROLLOUT, "r")
    whole = encode(rollout("r"))
    damaged = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "not ours": b"PAR1" + b"\0" * 100 + b"PAR1",
        "flipped": whole[:40] + bytes([whole[40] ^ 0xFF] * 200) + whole[240:],
        "two": encode_all([rollout("r"), rollout("s")]),
    }
    for data in damaged.values():
        await store.put(key, data)
        with pytest.raises(DamagedObject) as found:
            await read_trajectory(store, 1, Kind.ROLLOUT, "r")
        assert found.value.key == key and "delete this object" in found.value.remedy


async def test_a_missing_one_is_damage_and_no_crash(store: Store) -> None:
    with pytest.raises(DamagedObject, match="is not there"):
        await read_trajectory(store, 1, Kind.ROLLOUT, "r")


TOLD = TopLogprobs(token_ids=[5, 2], top_ids=[5, 6, 2, 5], top_logprobs=[-0.25, -1.6, -0.0, -9999.0])


def _told(trajectory: Trajectory) -> Trajectory:
    turns = tuple(turn.model_copy(update={"label": turn.action.model_copy(update={"logprobs": TOLD})}) for turn in trajectory.turns)
    return trajectory.model_copy(update={"turns": turns})


def test_files_from_before_there_were_log_probabilities_are_read(rollout: Make) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    trajectory = rollout("r")
    new = pq.read_table(pa.BufferReader(encode(trajectory)))
    turn = new.schema.field("turns").type.value_type
    completion = turn.field("action").type
    assert completion.get_field_index("logprobs") < 0 <= turn.field("label").type.get_field_index("logprobs")
    old_turn = pa.struct([field.with_type(completion) if field.name == "label" else field for field in turn])
    schema = new.schema.set(new.schema.get_field_index("turns"), pa.field("turns", pa.list_(old_turn)))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(new.to_pylist(), schema=schema), sink)
    assert decode(bytes(sink.getvalue()), "key") == trajectory


def test_log_probabilities_train_so_they_are_part_of_the_digest_and_without_them_it_is_what_it_was(rollout: Make) -> None:
    bare = rollout("r")
    assert b"logprobs" not in canonical(bare)
    fields = json.loads(canonical(_told(bare)))
    assert fields["turns"][0]["label"]["logprobs"] == {
        "token_ids": base64.b64encode(struct.pack("<2i", 5, 2)).decode(),
        "top_ids": base64.b64encode(struct.pack("<4i", 5, 6, 2, 5)).decode(),
        "top_logprobs": base64.b64encode(struct.pack("<4f", -0.25, -1.6, -0.0, -9999.0)).decode(),
    }
    for turn in fields["turns"]:
        del turn["label"]["logprobs"]
    assert fields == json.loads(canonical(bare))


def test_log_probabilities_that_do_not_fit_their_tokens_are_damage(rollout: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = {"token_ids": [5, 2], "top_ids": [[5, 6], [2]], "top_logprobs": [[-0.25, -1.5], [-1.0]]}
    monkeypatch.setattr(TopLogprobs, "columns", lambda self: ragged)
    with pytest.raises(DamagedObject, match="3 log-probabilities for 2 tokens"):
        decode(encode(_told(rollout("r"))), "key")


@pytest.mark.heavy
def test_the_datasets_library_reads_it(rollout: Make, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.parquet").write_bytes(encode_all([_told(rollout("a")), rollout("b", turns=0, kappa=3)]))
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["rollout_id"] == ["a", "b"] and rows[1]["kappa"] == 3
    turn = rows[0]["turns"][1]
    assert json.loads(turn["action"]["message"])["content"].startswith("a turn 1") and turn["beta"] == 0.6
    assert turn["label"]["logprobs"]["top_ids"] == [[5, 6], [2, 5]]
