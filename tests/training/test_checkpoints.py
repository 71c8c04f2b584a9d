"""Which checkpoints are kept, and which training goes on from: one rank with a played engine, whose state is its last tag."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from structlog.testing import capture_logs

from dagger_operator.api import Storage
from dagger_operator.store.objects import Store

pytestmark = pytest.mark.heavy


class PlayedEngine:
    def __init__(self) -> None:
        self.module, self.tag = SimpleNamespace(parameters=lambda: ()), ""

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        (Path(folder) / tag / "state").write_text(tag)

    def load_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        self.tag = (Path(folder) / tag / "state").read_text()


class OneRank:
    """Trainings one after the other on one store."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.store = folder, Store.open(Storage(url=f"file://{folder}/store"))

    async def train(self, stage: int, *steps: int, course: str = "") -> int:
        """Stores checkpoints after `steps` steps, and returns the steps of the one that it went on from; 0 where it began anew."""
        from dagger_operator.training.checkpoints import Checkpoints, Tally

        kept = Checkpoints(self.store, self._folder / "scratch", 1, course, zero_stage=stage, node=0, every_steps=1)
        begun, engine = await kept.resume(there := PlayedEngine()), PlayedEngine()
        assert not begun.steps or there.tag.endswith(f"{begun.steps:08d}"), "the state is the one that the tally is of"
        for step in steps:
            await kept.save(engine, Tally(losses=(1.0,) * step))
        return begun.steps

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
