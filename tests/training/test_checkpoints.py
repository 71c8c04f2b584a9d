"""Which checkpoints are kept, and which training goes on from: one rank with a played engine, whose state is its last tag."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from dagger_operator.api import Storage
from dagger_operator.store.objects import Store

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
        from dagger_operator.training.checkpoints import Checkpoints, Tally

        kept = Checkpoints(self.store, self._folder / "scratch", 1, course, zero_stage=stage, node=0, every_steps=1)
        begun, engine = await kept.resume(there := PlayedEngine(self._names)), PlayedEngine(self._names)
        assert not begun.steps or there.tag.endswith(f"{begun.steps:08d}"), "the state is the one that the tally is of"
        for step in steps:
            await kept.save(engine, Tally(losses=(1.0,) * step))
        return begun.steps

    async def files(self) -> list[str]:
        """Steps and name of every file in a checkpoint."""
        keys = [info.key for info in await self.store.list()]
        return [key.rpartition("-")[2] for key in keys if not key.endswith("/manifest.json")]

    async def checkpoints(self) -> int:
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
        assert await rank.checkpoints() == 2, "what is stored stays bounded"
        assert await rank.train(3) == step
    assert await rank.train(2) == 0


async def test_no_stage_brings_back_a_checkpoint_of_another_training(rank: OneRank) -> None:
    await rank.train(2, 40, 50)
    assert await rank.train(3, course="another learning rate") == 0
    assert await rank.checkpoints() == 0


async def test_a_notice_between_two_steps_stores_no_state_over_the_same(rank: OneRank) -> None:
    """Cut short, it would leave files that the manifest does not describe; and a large one takes most of the notice."""
    await rank.train(2, 40, 40)
    assert await rank.train(2, 40, 41) == 40, "a notice in the step after it was resumed, perhaps by other ranks"
    assert await rank.files() == ["00000040/1", "00000041/2"]


async def test_a_notice_in_the_first_step_stores_nothing(rank: OneRank) -> None:
    """Adam has no state yet, which a checkpoint needs to be cut for another number of ranks."""
    await rank.train(2, 0)
    assert await rank.checkpoints() == 0


async def test_files_of_a_damaged_checkpoint_are_in_none_that_comes_after(rank: OneRank) -> None:
    await rank.train(2, 40)
    (key,) = (info.key for info in await rank.store.list() if info.key.endswith("/1"))
    await rank.store.put(key, b"damaged")
    assert await rank.train(2, 40) == 0
    assert await rank.files() == ["00000040/2"]
