"""fsck finds every kind of damage, names the object, and says what to do."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dagger_operator.api import DAggerRun, RolloutSummary
from dagger_operator.store import layout
from dagger_operator.store.claims import Claims
from dagger_operator.store.fsck import fsck
from dagger_operator.store.layout import Kind
from dagger_operator.store.manifest import close_round
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.policies import PolicyManifest, point_to, save_policy
from dagger_operator.store.records import Outcome, Trajectory
from dagger_operator.store.results import PrepareResult, RolloutResult, TrainingResult, save_result
from dagger_operator.store.task_sets import TaskSet, TaskSets, pin_task_sets
from dagger_operator.store.terms import begin_term
from dagger_operator.store.trajectories import encode, finished, write_trajectory
from fixtures.results import result

Make = Callable[..., Trajectory]
IDS = ["0000", "0001", "0002", "0003"]


@pytest.fixture
async def sound(store: Store, rollout: Make, run: DAggerRun, tmp_path: Path) -> dict[str, str]:
    """A run after its first round's rollouts; keys of its objects by what they are."""
    await take_prefix(store, run)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"weights")
    student = await save_policy(
        store, tmp_path / "student", round=0, base_model="tiny", parent=None, data_digest=None, settings={}, software={}
    )
    await pin_task_sets(store, TaskSets(training=TaskSet(tasks={"task-1": "0" * 16}), held_out=TaskSet(tasks={})))
    await save_result(store, 0, PrepareResult(policy=student.version, teacher="endpoint-x"))
    await point_to(store, student.version, 0)
    for rollout_id in IDS[:3]:
        await write_trajectory(store, Kind.ROLLOUT, rollout(rollout_id))
    await write_trajectory(store, Kind.ROLLOUT, rollout(IDS[3], outcome=Outcome.INFRASTRUCTURE_FAILURE))
    await write_trajectory(store, Kind.EVALUATION, rollout("e"))
    manifest = await close_round(store, "a-run", 1, IDS)
    assert manifest is not None and await finished(store, 1, Kind.ROLLOUT) == set(IDS)
    summary = RolloutSummary(
        rollouts=4,
        turns=9,
        labels=9,
        label_coverage=1,
        teacher_turn_share=1,
        teacher_token_share=1,
        data_digest=manifest.data_digest,
        seconds=1,
    )
    await save_result(store, 1, RolloutResult(summary=summary, manifest_digest=manifest.digest, excluded=manifest.excluded))
    return {
        "owner": layout.RUN,
        "tasks": layout.TASKS,
        "pointer": layout.POLICY,
        "weights": layout.policy(student.version) + "model.safetensors",
        "policy": layout.policy_manifest(student.version),
        "trajectory": layout.trajectory(1, Kind.ROLLOUT, "0001"),
        "evaluated": layout.trajectory(1, Kind.EVALUATION, "e"),
        "manifest": layout.manifest(1),
        "shard": layout.shard(1, manifest.shards[0].digest),
        "rollout": layout.result(1, "rollout"),
        "prepare": layout.result(0, "prepare"),
    }


async def test_a_sound_run_is_said_to_be_sound(store: Store, sound: dict[str, str]) -> None:
    report = await fsck(store, deep=True)
    assert report.sound, str(report)
    assert report.looked_at == {"objects": len(sound) + 3, "trajectories": 5, "shards": 1, "policies": 1}
    assert "all sound" in str(report)


async def test_a_round_under_way_is_sound(store: Store, sound: dict[str, str], rollout: Make) -> None:
    assert await Claims(store, 2, Kind.ROLLOUT, "w", 60).take("0000") is not None
    await write_trajectory(store, Kind.ROLLOUT, rollout("0001", round=2))
    assert (await fsck(store)).sound


async def test_the_initial_students_evaluation_is_looked_at_like_any_other(store: Store, sound: dict[str, str], rollout: Make) -> None:
    await write_trajectory(store, Kind.EVALUATION, rollout("0000", round=0))
    await save_result(store, 0, result("evaluation", 0))
    report = await fsck(store)
    assert report.sound and report.looked_at["trajectories"] == 6
    await Claims(store, 0, Kind.EVALUATION, "w", 60).take("0001")
    assert [problem.key for problem in (await fsck(store)).problems] == [layout.claim(0, Kind.EVALUATION, "0001")]


async def test_any_object_that_is_garbled_is_found_and_named(store: Store, sound: dict[str, str]) -> None:
    for key in sound.values():
        whole = await store.get(key)
        assert whole is not None
        await store.put(key, b"\0garbled")
        found = await fsck(store)
        assert key in {problem.key for problem in found.problems}, f"{key}: {found}"
        assert all(problem.remedy for problem in found.problems)
        await store.put(key, whole.data)
    assert (await fsck(store)).sound


@pytest.mark.parametrize("what", ["owner", "weights", "policy", "trajectory", "shard", "manifest"])
async def test_an_object_that_is_gone_is_missed(store: Store, sound: dict[str, str], what: str) -> None:
    await store.delete(sound[what])
    assert not (await fsck(store)).sound


async def test_weights_of_the_right_size_and_wrong_content_are_found_by_a_deep_look(store: Store, sound: dict[str, str]) -> None:
    await store.put(sound["weights"], b"weightz")
    assert (await fsck(store)).sound
    deep = await fsck(store, deep=True)
    assert [problem.key for problem in deep.problems] == [sound["weights"]]


Harm = Callable[[Store, Make], Awaitable[None]]


async def _exchanged(store: Store, rollout: Make) -> None:
    await store.put(layout.trajectory(1, Kind.ROLLOUT, "0001"), encode(rollout("0001", patch="forged")))


async def _misplaced(store: Store, rollout: Make) -> None:
    await store.put(layout.trajectory(1, Kind.ROLLOUT, "0001"), encode(rollout("0002")))


async def _doubled(store: Store, rollout: Make) -> None:
    await write_trajectory(store, Kind.ROLLOUT, rollout("9999"))


async def _abandoned(store: Store, rollout: Make) -> None:
    await Claims(store, 1, Kind.ROLLOUT, "w", 60).take("8888")


async def _lost_policy(store: Store, rollout: Make) -> None:
    await point_to(store, "r005-gone", 5)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_exchanged, "digest is another"),
        (_misplaced, "holds rollout 0002"),
        (_doubled, "accounts for 4 rollouts, 5"),
        (_abandoned, "never finished"),
        (_lost_policy, "r005-gone, which is not in the store"),
    ],
)
async def test_what_does_not_fit_together_is_found(store: Store, sound: dict[str, str], rollout: Make, harm: Harm, words: str) -> None:
    await harm(store, rollout)
    report = await fsck(store)
    assert len(report.problems) == 1 and words in str(report)


async def _student(store: Store, folder: Path, weights: bytes, parent: str | None = None) -> PolicyManifest:
    """A version that round 1 made, or another one of round 0."""
    (folder / "student" / "model.safetensors").write_bytes(weights)
    made = {"base_model": "tiny", "parent": parent, "data_digest": "d" if parent else None, "settings": {}, "software": {}}
    return await save_policy(store, folder / "student", round=1 if parent else 0, **made)


def _trained(version: str) -> TrainingResult:
    given = result("training", 1)
    assert isinstance(given, TrainingResult)
    return given.model_copy(update={"policy": version})


async def test_a_version_that_no_result_names_is_reported_with_its_size_once_its_round_is_done(
    store: Store, sound: dict[str, str], tmp_path: Path
) -> None:
    parent = sound["policy"].split("/")[1]
    left = [await _student(store, tmp_path, b"of a training that was killed", parent), await _student(store, tmp_path, b"other", None)]
    await store.delete(layout.policy_manifest(left[1].version))  # one that was not even stored whole
    kept = await _student(store, tmp_path, b"of the one that resumed", parent)
    during = await fsck(store)
    assert [problem.key for problem in during.problems] == [layout.policy(left[1].version)], "the other may be being stored just now"
    await save_result(store, 1, _trained(kept.version))
    found = {problem.key: problem for problem in (await fsck(store)).problems}
    assert found.keys() == {layout.policy(version.version) for version in left}
    said = str(found[layout.policy(left[0].version)])
    size = sum(info.size for info in await store.list(layout.policy(left[0].version)))
    assert "no result names this version" in said and f"(2 objects, {size} bytes); delete the folder" in said


async def test_no_version_is_said_to_be_left_over_while_the_result_that_may_name_it_is_garbled(
    store: Store, sound: dict[str, str], tmp_path: Path
) -> None:
    made = await _student(store, tmp_path, b"trained", sound["policy"].split("/")[1])
    await save_result(store, 1, _trained(made.version))
    for key in (layout.result(1, "training"), sound["prepare"]):
        whole = await store.get(key)
        assert whole is not None
        await store.put(key, b"garbled")
        assert [problem.key for problem in (await fsck(store)).problems] == [key]
        await store.put(key, whole.data)


async def test_trainer_state_is_left_over_once_its_round_is_done_and_not_before(
    store: Store, sound: dict[str, str], tmp_path: Path
) -> None:
    await begin_term(store, 1, 0)
    await store.put(f"{layout.checkpoint_prefix(1)}zero2-term-0001-00000000-step-00000010/state", b"12345")
    assert (await fsck(store)).sound, "training may be under way"
    await store.put(layout.term(1), b"garbled")
    assert [problem.key for problem in (await fsck(store)).problems] == [layout.term(1)]
    await save_result(store, 1, _trained((await _student(store, tmp_path, b"trained", sound["policy"].split("/")[1])).version))
    (problem,) = (await fsck(store)).problems
    assert problem.key == layout.checkpoint_prefix(1) and "(2 objects, 12 bytes)" in problem.problem
