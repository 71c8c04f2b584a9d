"""Which checkpoints are kept, and which training goes on from: one rank with a played engine, whose state is its last tag."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from dagger_operator.api import Storage
from dagger_operator.store import layout
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import save_policy
from dagger_operator.store.stage import StageFailure

if TYPE_CHECKING:
    from dagger_operator.training.checkpoints import Checkpoints

pytestmark = pytest.mark.heavy


class PlayedEngine:
    def __init__(self, names: Iterator[int]) -> None:
        """Every time that it saves, its file has the next of these names."""
        self.module, self.tag, self._names = SimpleNamespace(parameters=lambda: ()), "", names

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        (Path(folder) / tag).mkdir(parents=True, exist_ok=True)
        (Path(folder) / tag / f"{next(self._names)}").write_text(tag)

    def load_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        (file,) = (Path(folder) / tag).iterdir()
        self.tag = file.read_text()


class OneRank:
    """Trainings one after the other on one store."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._names, self.store = folder, itertools.count(1), Store.open(Storage(url=f"file://{folder}/store"))

    async def train(self, stage: int, *steps: int, course: str = "") -> int:
        """Stores checkpoints after `steps` steps, and returns the steps of the one that it resumed; 0 where there was none."""
        kept = self.checkpoints(stage, course=course)
        begun = await self.resume(kept)
        for step in steps:
            await self.save(kept, step)
        return begun

    def checkpoints(self, stage: int = 2, scratch: str = "scratch", course: str = "") -> "Checkpoints":
        from dagger_operator.training.checkpoints import Checkpoints

        return Checkpoints(self.store, self._folder / scratch, 1, course, zero_stage=stage, node=0, every_steps=1)

    async def resume(self, kept: "Checkpoints") -> int:
        begun = await kept.resume(there := PlayedEngine(self._names))
        assert not begun.steps or there.tag.endswith(f"{begun.steps:08d}"), "the state is the one that the tally is of"
        return begun.steps

    async def save(self, kept: "Checkpoints", step: int) -> None:
        from dagger_operator.training.checkpoints import Tally

        await kept.save(PlayedEngine(self._names), Tally(losses=(1.0,) * step))

    async def two(self, *steps: int) -> tuple["Checkpoints", "Checkpoints"]:
        """A training that stored checkpoints after these steps, and one that was started meanwhile and does not run yet."""
        older = self.checkpoints(scratch="lost")
        await self.resume(older)
        for step in steps:
            await self.save(older, step)
        return older, self.checkpoints(scratch="replacement")

    async def keys(self) -> set[str]:
        return {info.key for info in await self.store.list()}

    async def files(self) -> list[str]:
        """Steps and name of every file in a checkpoint."""
        keys = [info.key for info in await self.store.list()]
        return [key.rpartition("-")[2] for key in keys if not key.endswith(("/manifest.json", "/term.json"))]

    async def stored(self) -> int:
        return sum(info.key.endswith("/manifest.json") for info in await self.store.list())


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[OneRank]:
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield OneRank(tmp_path)
    torch.distributed.destroy_process_group()


async def test_another_zero_stage_begins_anew_and_goes_on_once_it_is_set_back(rank: OneRank) -> None:
    await rank.train(2, 40, 50)
    with capture_logs() as logs:
        assert await rank.train(3) == 0
    assert {log["why"] for log in logs} == {"it serves with training.deepspeed.zeroStage 2 alone"}
    assert await rank.train(2) == 50
    assert await rank.train(3, 5) == 0
    assert await rank.train(2) == 50, "one of the other stage does not take the newest one's place"


async def test_those_of_another_stage_give_way_to_newer_ones_however_far_they_are(rank: OneRank) -> None:
    await rank.train(2, 40, 50)
    for step in (5, 40, 41):
        await rank.train(3, step)
        assert await rank.stored() == 2, "what is stored stays bounded"
        assert await rank.train(3) == step
    assert await rank.train(2) == 0


async def test_no_stage_brings_back_a_checkpoint_of_another_training(rank: OneRank) -> None:
    await rank.train(2, 40, 50)
    assert await rank.train(3, course="another learning rate") == 0
    assert await rank.stored() == 0


async def test_a_notice_between_two_steps_stores_no_state_over_the_same(rank: OneRank) -> None:
    """Cut short, it would leave files that the manifest does not describe; and a large one takes most of the notice."""
    await rank.train(2, 40, 40)
    assert await rank.train(2, 40, 41) == 40, "a notice in the step after it was resumed, perhaps by other ranks"
    assert await rank.files() == ["00000040/1", "00000041/2"]


async def test_a_notice_in_the_first_step_stores_nothing(rank: OneRank) -> None:
    """Adam has no state yet, which a checkpoint needs to be cut for another number of ranks."""
    await rank.train(2, 0)
    assert await rank.stored() == 0


async def test_files_of_a_damaged_checkpoint_are_in_none_that_comes_after(rank: OneRank) -> None:
    await rank.train(2, 40)
    (key,) = (info.key for info in await rank.store.list() if info.key.endswith("/1"))
    await rank.store.put(key, b"damaged")
    assert await rank.train(2, 40) == 0
    assert await rank.files() == ["00000040/2"]


async def test_a_training_that_was_replaced_stores_nothing_and_deletes_nothing_and_ends(rank: OneRank) -> None:
    """As where a node lost the API server but not the storage, and its pod was given up for lost."""
    older, newer = await rank.two(10, 20)
    assert await rank.resume(newer) == 20
    before = await rank.keys()
    for ending in (rank.save(older, 30), older.forget(), older.require_term()):
        with pytest.raises(StageFailure, match="TrainingReplaced: training 2 of this round began after this one, training 1") as ended:
            await ending
        assert not ended.value.permanent, "infrastructure lost it"
    assert await rank.keys() == before
    for step in (30, 40):
        await rank.save(newer, step)
    await newer.forget()
    assert await rank.keys() == set(), "the term goes with the checkpoints"
    with pytest.raises(StageFailure, match="TrainingReplaced: another training of this round finished"):
        await rank.save(older, 50)
    assert await rank.keys() == set()


async def test_a_training_that_is_replaced_while_it_uploads_leaves_no_manifest_and_takes_no_checkpoint_away(
    rank: OneRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = await rank.two(10, 20)
    upload = rank.store.upload

    async def meanwhile(key: str, path: Path) -> None:
        await upload(key, path)
        monkeypatch.undo()
        assert await rank.resume(newer) == 20
        await rank.save(newer, 30)

    monkeypatch.setattr(rank.store, "upload", meanwhile)
    with pytest.raises(StageFailure, match="TrainingReplaced"):
        await rank.save(older, 30)
    assert await rank.stored() == 2, "the one that it resumed from, and its own"
    assert await rank.train(2) == 30


async def test_a_training_that_is_replaced_while_it_resumes_gives_no_checkpoint_up(rank: OneRank, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = await rank.two(10)

    async def meanwhile(*_: object) -> bool:
        monkeypatch.undo()
        assert await rank.resume(newer) == 10
        return False  # as where a file cannot be found

    monkeypatch.setattr(rank.store, "download", meanwhile)
    with pytest.raises(StageFailure, match="TrainingReplaced"):
        await rank.resume(older)
    assert await rank.stored() == 1


async def test_two_trainings_never_write_to_the_same_keys(rank: OneRank) -> None:
    """The files of one under the manifest of the other would count as damaged: GPUs do not compute the same bits twice."""
    _, newer = await rank.two(10)
    await rank.resume(newer)
    before = await rank.keys()
    await rank.save(newer, 20)
    (term,) = {key.partition("-term-")[2].partition("-step-")[0] for key in await rank.keys() - before}
    assert term.startswith("0002-") and not any(term in key for key in before)


@pytest.mark.parametrize("lost", [None, b"{}"])
async def test_a_term_that_is_lost_or_garbled_is_followed_by_a_higher_one(rank: OneRank, lost: bytes | None) -> None:
    """Otherwise a training would remove what it just stored as the oldest."""
    for step in (40, 50, 60):
        await rank.train(2, step)
    await (rank.store.delete(layout.term(1)) if lost is None else rank.store.put(layout.term(1), lost))
    assert await rank.train(2, 70, 80) == 60
    assert await rank.train(2) == 80


async def test_a_checkpoint_of_before_there_were_terms_is_resumed_and_gives_way_to_newer_ones(rank: OneRank) -> None:
    await rank.train(2, 40)
    for key in await rank.keys():
        tag = key.removeprefix(layout.checkpoint_prefix(1)).partition("/")[0]
        if "-step-" in key and (there := await rank.store.get(key)):
            await rank.store.put(key.replace(tag, "zero2-step-00000040"), there.data)
        await rank.store.delete(key)
    assert await rank.train(2, 50, 60) == 40
    assert await rank.stored() == 2
    assert await rank.train(2) == 60


@pytest.mark.parametrize("when", ["before", "while"])
async def test_a_training_that_is_replaced_before_it_stored_its_result_stores_none(
    rank: OneRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from dagger_operator.training import rank as body
    from dagger_operator.training.checkpoints import Tally

    older, newer = await rank.two(10)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")

    async def saved(*given: Any, **more: Any) -> Any:
        made = await save_policy(*given, **more)
        await rank.resume(newer)
        return made

    parent = await save_policy(
        rank.store, tmp_path / "export", round=0, base_model="tiny", parent=None, data_digest=None, settings={}, software={}
    )
    if when == "before":
        await rank.resume(newer)
    else:
        monkeypatch.setattr(body, "save_policy", saved)
    before = await rank.keys()
    stage: Any = SimpleNamespace(store=rank.store, round=1, run=SimpleNamespace(spec=SimpleNamespace(training=SimpleNamespace(lora=None))))
    given: Any = SimpleNamespace(parent=parent.version, data=SimpleNamespace(digest="d"))
    tokenised: Any = SimpleNamespace(too_long=0, hard_labels=0)
    tally = Tally(losses=(1.0,), labels=1, tokens=1, unpacked=1)
    with pytest.raises(StageFailure, match="TrainingReplaced"):
        await body._store(stage, given, {}, tokenised, older, tally, tmp_path / "export", 0.0)
    new = await rank.keys() - before
    assert layout.result(1, "training") not in new
    assert any(key.startswith(layout.policy("r001")[:-1]) for key in new) == (when == "while")
    await newer.require_term()
