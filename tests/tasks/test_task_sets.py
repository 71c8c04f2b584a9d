"""What a run's tasks are is decided once, whatever becomes of the files and data sets that they were read from."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from dagger_operator.api import HeldOut, SourceType, Tasks, TaskSource
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import StageFailure
from dagger_operator.tasks.sources import load_held_out, load_training

Rows = list[dict[str, Any]]


def row(id: str, statement: str = "Mend it.") -> dict[str, Any]:
    return {"id": id, "statement": statement, "grading": {"command": "true"}}


class Files:
    """Two sets of tasks in files, and a run that reads them."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.train, self.held_out = [row(f"t{number}") for number in range(4)], [row(f"h{number}") for number in range(3)]

    def spec(self, count: int | None = None) -> Tasks:
        train, held_out = (TaskSource(type=SourceType.JSONL, uri=str(self.folder / f"{name}.jsonl")) for name in ("train", "held-out"))
        return Tasks(source=train, held_out=HeldOut(source=held_out, count=count))

    def write(self) -> None:
        for name, rows in (("train", self.train), ("held-out", self.held_out)):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))

    async def load(self, count: int | None = None) -> tuple[list[str], list[str]]:
        """Ids of both sets, as two stages read them."""
        self.write()
        train = await load_training(self.spec(count), self.store, {})
        return [task.id for task in train], [task.id for task in await load_held_out(self.spec(count), self.store, {})]


@pytest.fixture
def files(tmp_path: Path, store: Store) -> Files:
    return Files(tmp_path, store)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train, held_out: train.pop(), r"spec\.tasks\.source .*train\.jsonl' .*: 1 gone, such as t3\."),
        (lambda train, held_out: train.append(row("x")), r"spec\.tasks\.source .*: 1 new, such as x\."),
        (lambda train, held_out: train.__setitem__(1, row("t1", "Break it.")), r"spec\.tasks\.source .*: 1 changed, such as t1\."),
        (lambda train, held_out: held_out.pop(), r"spec\.tasks\.heldOut\.source .*: 1 gone, such as h2\."),
        (lambda train, held_out: held_out.append(train.pop()), r"spec\.tasks\.source .*: 1 gone, such as t3\."),
        (lambda train, held_out: train.__setitem__(slice(0, 4), [row("y")]), r": 4 gone, such as t0, t1, t2; 1 new, such as y\."),
    ],
)
async def test_other_tasks_than_a_run_began_with_are_refused_until_they_are_restored(
    files: Files, change: Callable[[Rows, Rows], None], words: str
) -> None:
    both = await files.load()
    before = list(files.train), list(files.held_out)
    change(files.train, files.held_out)
    with pytest.raises(StageFailure, match=f"TasksChanged: .*{words} .*tasks.json.*make a new run") as caught:
        await files.load()
    assert caught.value.permanent
    files.train, files.held_out = before
    assert await files.load() == both


async def test_the_order_of_rows_is_no_change(files: Files) -> None:
    both = await files.load()
    files.train.reverse()
    assert tuple(map(sorted, await files.load())) == both


async def test_sets_that_cannot_be_used_may_be_mended(files: Files) -> None:
    files.held_out = [row("h0"), row("t0")]
    with pytest.raises(StageFailure, match=r"InvalidTasks.*t0"):
        await files.load()
    files.held_out = [row("h0")]
    with pytest.raises(StageFailure, match=r"TooFewTasks: .* is 2 and its source has 1.*add tasks"):
        await files.load(count=2)  # by the first who reads them, and not when a round has been trained
    files.held_out = [row("h0"), row("h1")]
    assert await files.load(count=2) == (["t0", "t1", "t2", "t3"], ["h0", "h1"])


class Hub:
    """Stands in for the hub's client: a data set that has commits. `newest` may come to be another with every look."""

    def __init__(self, commits: dict[str, Rows], newest: Callable[[], str]) -> None:
        self.commits, self.newest = commits, newest

    def load_dataset_builder(self, uri: str, revision: str | None) -> SimpleNamespace:
        assert uri == "owner/name"
        commit = revision or self.newest()
        return SimpleNamespace(hash=commit, download_and_prepare=lambda: None, as_dataset=lambda split: self.commits[commit])


def published(*numbers: int) -> Rows:
    fields = ("problem_statement", "image", "repo", "version", "log_parser", "eval_type", "eval_script")
    told = {**dict.fromkeys(fields, "x"), "log_parser": "parse_log_pytest", "eval_type": "pass_and_fail"}
    return [{**told, "instance_id": f"o__r-{number}", "FAIL_TO_PASS": ["a"], "PASS_TO_PASS": []} for number in numbers]


async def from_the_hub(files: Files) -> list[str]:
    files.write()
    source = TaskSource(type=SourceType.SWE_BENCH, uri="owner/name", split="train")
    spec = files.spec().model_copy(update={"source": source})
    return [task.id for task in await load_training(spec, files.store, {})]


async def test_a_data_set_of_the_hub_stays_at_the_commit_that_it_had_first(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["old", "new"])
    hub = Hub({"old": published(1, 2), "new": published(1)}, lambda: next(commits))
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    assert await from_the_hub(files) == await from_the_hub(files) == ["o__r-1", "o__r-2"]


async def test_of_workers_that_come_at_once_the_first_decides_for_all(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    both_look, lock, commits = threading.Barrier(2, timeout=60), threading.Lock(), iter(["old", "new"])

    def newest() -> str:
        both_look.wait()
        with lock:
            return next(commits)

    hub = Hub({"old": published(1, 2), "new": published(1)}, newest)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    one, other = await asyncio.gather(from_the_hub(files), from_the_hub(files))
    assert one == other
