"""A round's data set: the same for the same data, made once, verified when it is read."""

import asyncio
import random
from collections.abc import Callable

import pytest

from dagger_operator.api import Aggregation
from dagger_operator.store import layout
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import RoundManifest, close_round, read_manifest, training_set
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.records import Failure, LabelFlaw, Outcome, Trajectory
from dagger_operator.store.stage import StageFailure
from dagger_operator.store.trajectories import canonical, write_trajectory

Make = Callable[..., Trajectory]
IDS = [f"{number:04d}" for number in range(10)]


async def fill(store: Store, rollout: Make, *, round: int = 1, ids: list[str] = IDS, **more: object) -> None:
    for rollout_id in ids:
        await write_trajectory(store, Kind.ROLLOUT, rollout(rollout_id, round=round, **more))


async def closed(store: Store, round: int = 1, ids: list[str] = IDS, **more: int) -> RoundManifest:
    manifest = await close_round(store, "a-run", round, ids, **more)
    assert manifest is not None
    return manifest


async def cleared(store: Store) -> None:
    """Round 1 as if it had not been."""
    for info in await store.list(layout.round_prefix(1)):
        await store.delete(info.key)


async def test_a_round_closes_when_its_last_rollout_is_there(store: Store, rollout: Make) -> None:
    await fill(store, rollout, ids=IDS[:-1])
    assert await close_round(store, "a-run", 1, IDS) is None and await read_manifest(store, 1) is None
    await fill(store, rollout, ids=IDS[-1:])
    manifest = await closed(store)
    assert (manifest.rollouts, manifest.turns, manifest.labels, manifest.excluded) == (10, 30, 30, {})
    assert manifest.policies == ("r000-aaaaaaaaaaaa", "teacher-1") and manifest.tasks == ("task-1",)
    assert await read_manifest(store, 1) == manifest


async def test_the_same_data_gives_the_same_digests_whoever_gathered_it(store: Store, rollout: Make) -> None:
    await fill(store, rollout, ids=IDS)
    first = await closed(store)
    await cleared(store)
    await fill(store, rollout, ids=random.sample(IDS, len(IDS)))
    assert await closed(store) == first


async def test_other_data_gives_another_digest(store: Store, rollout: Make) -> None:
    await fill(store, rollout)
    first = await closed(store)
    await cleared(store)
    await fill(store, rollout, ids=IDS[:-1])
    await fill(store, rollout, ids=IDS[-1:], patch="another")
    assert (await closed(store)).data_digest != first.data_digest


async def test_many_closers_end_with_one_manifest(store: Store, rollout: Make) -> None:
    await fill(store, rollout)
    manifests = await asyncio.gather(*(closed(store, shard_rows=3) for _ in range(6)))
    assert len({manifest.digest for manifest in manifests}) == 1


async def test_what_infrastructure_broke_is_counted_and_left_out(store: Store, rollout: Make) -> None:
    broken = {"outcome": Outcome.INFRASTRUCTURE_FAILURE}
    await fill(store, rollout, ids=IDS[:7])
    await fill(store, rollout, ids=IDS[7:9], **broken, failure=Failure(reason="SandboxLost", message="node gone"))
    await fill(store, rollout, ids=IDS[9:], **broken, failure=Failure(reason="TeacherDown", message="503"))
    manifest = await closed(store)
    assert manifest.rollouts == 7 and manifest.excluded == {"SandboxLost": 2, "TeacherDown": 1}
    read = [t.rollout_id async for t in (await training_set(store, 1, Aggregation.CURRENT_ROUND_ONLY)).trajectories()]
    assert read == IDS[:7]


async def test_flawed_labels_do_not_count(store: Store, rollout: Make) -> None:
    whole = rollout("0000")
    turns = (whole.turns[0].model_copy(update={"label_flaw": LabelFlaw.TRUNCATED}), whole.turns[1].model_copy(update={"label": None}))
    await write_trajectory(store, Kind.ROLLOUT, whole.model_copy(update={"turns": (*turns, whole.turns[2])}))
    assert (await closed(store, ids=["0000"])).labels == 1


@pytest.mark.parametrize("bounds", [{"shard_rows": 3}, {"shard_bytes": 10_000}, {"shard_bytes": 1}])
async def test_shards_are_bounded_and_the_data_digest_does_not_depend_on_them(store: Store, rollout: Make, bounds: dict[str, int]) -> None:
    await fill(store, rollout, size=1000)
    whole = await closed(store)
    await cleared(store)
    await fill(store, rollout, size=1000)
    bounded = await closed(store, **bounds)
    assert (len(whole.shards), bounded.data_digest) == (1, whole.data_digest)
    assert len(bounded.shards) > 1 and sum(shard.rows for shard in bounded.shards) == 10
    read = [t async for t in (await training_set(store, 1, Aggregation.CURRENT_ROUND_ONLY)).trajectories()]
    assert [t.rollout_id for t in read] == IDS
    assert [canonical(t) for t in read] == [canonical(rollout(i, size=1000)) for i in IDS]


async def test_aggregation_takes_all_rounds_or_the_last(store: Store, rollout: Make) -> None:
    for number in (1, 2, 3):
        await fill(store, rollout, round=number, ids=IDS[:2])
        await closed(store, number, IDS[:2])
    for aggregation, rounds in (
        (Aggregation.ALL_ROUNDS_FROM_BASE, [1, 1, 2, 2]),
        (Aggregation.ALL_ROUNDS_WARM_START, [1, 1, 2, 2]),
        (Aggregation.CURRENT_ROUND_ONLY, [2, 2]),
    ):
        data = await training_set(store, 2, aggregation)
        assert [t.round async for t in data.trajectories()] == rounds
    alone, first = await training_set(store, 1, Aggregation.CURRENT_ROUND_ONLY), await read_manifest(store, 1)
    assert first is not None and alone.digest == first.data_digest


async def test_an_open_round_cannot_be_trained_on(store: Store, rollout: Make) -> None:
    await fill(store, rollout, round=2)
    await closed(store, 2)
    with pytest.raises(StageFailure, match="round 1 has no data set"):
        await training_set(store, 2, Aggregation.ALL_ROUNDS_FROM_BASE)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
async def test_a_damaged_shard_is_named_and_none_of_it_is_trained_on(store: Store, rollout: Make, damage: str) -> None:
    await fill(store, rollout)
    manifest = await closed(store, shard_rows=5)
    key = layout.shard(1, manifest.shards[1].digest)
    whole = await store.get(key)
    assert whole is not None
    if damage == "gone":
        await store.delete(key)
    else:
        await store.put(key, whole.data[:-9] if damage == "cut" else whole.data[:99] + bytes([whole.data[99] ^ 1]) + whole.data[100:])
    trajectories = (await training_set(store, 1, Aggregation.CURRENT_ROUND_ONLY)).trajectories()
    assert [(await anext(trajectories)).rollout_id for _ in range(5)] == IDS[:5]
    with pytest.raises(DamagedObject) as found:
        await anext(trajectories)
    assert found.value.key == key
