"""The quickstart itself, as `make quickstart` runs it: real vLLM, real DeepSpeed, process sandboxes, and a better student at the end,
although it is killed in the middle of a round's rollouts and in the middle of a training."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagger_operator.api import DAggerRun, Phase
from dagger_operator.local.folder import RunFolder
from dagger_operator.local.processes import Reach, reap
from dagger_operator.policy.coins import coin
from dagger_operator.store.fsck import fsck
from dagger_operator.store.layout import Kind
from dagger_operator.store.objects import Store
from dagger_operator.store.trajectories import read_trajectories
from dagger_operator.tasks.deal import deal
from dagger_operator.tasks.sources import load_training

STORMS = ((2, Phase.ROLLOUT), (3, Phase.TRAINING))
"""Round and phase in which the run is killed with -9."""


class Quickstart:
    """`run.py` in a folder of its own, with a teacher on a port of its own."""

    def __init__(self, script: Path, folder: Path) -> None:
        self._script, self._folder = script, folder
        self._records = RunFolder(folder / ".dagger", "quickstart")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = {key: value for key, value in os.environ.items() if key != "DAGGER_HOME"}
        # No pipe: a process that outlived the run would hold it open.
        with (self._folder / "output").open("ab") as output:
            command = [sys.executable, self._script, "--port", self._port]
            self._process = subprocess.Popen(command, cwd=self._folder, env=environ, stdout=output, stderr=subprocess.STDOUT)

    def run(self) -> DAggerRun | None:
        return self._records.load()

    def output(self) -> str:
        return (self._folder / "output").read_text()[-5000:]

    def until(self, round_number: int, phase: Phase) -> None:
        while True:
            run = self.run()
            if run is not None and run.status is not None and (run.status.round, run.status.phase) == (round_number, phase):
                return
            assert self._process is not None and self._process.poll() is None, self.output()
            time.sleep(0.2)

    def kill(self) -> None:
        """kill -9 for the supervisor; whatever it had started is left to itself."""
        os.kill(int((self._records.path / "lock").read_text()), signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait()

    def clean_up(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if (run := self.run()) is not None:
            reap(Reach(f"{run.metadata.uid}/", self._records.logs))


@pytest.fixture
def example(quickstart: Path, tmp_path: Path) -> Iterator[Quickstart]:
    example = Quickstart(quickstart / "run.py", tmp_path)
    try:
        yield example
    finally:
        with contextlib.suppress(ProcessLookupError):
            example.clean_up()


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_killed_twice_it_still_ends_with_a_clearly_better_student_and_the_data_of_its_seed(example: Quickstart) -> None:
    seed = random.randrange(2**32)
    print(f"moments of seed {seed}")
    rng = random.Random(seed)
    example.start()
    for storm in STORMS:
        example.until(*storm)
        time.sleep(rng.uniform(3, 10))
        example.kill()
        example.start()
    assert example.wait() == 0, example.output()

    run = example.run()
    assert run is not None and run.status is not None and run.status.phase is Phase.SUCCEEDED
    _is_clearly_better(run)
    asyncio.run(_has_the_data_of_its_seed(run))


def _is_clearly_better(run: DAggerRun) -> None:
    assert run.status is not None
    evaluations = [entry.evaluation for entry in run.status.rounds if entry.evaluation]
    first, last = evaluations[0], evaluations[-1]
    assert len(evaluations) == run.spec.rounds
    assert last.resolved_rate > first.resolved_rate + 0.15
    assert last.false_submits <= 0.05 * last.tasks < first.false_submits


async def _has_the_data_of_its_seed(run: DAggerRun) -> None:
    """The tasks, coins and counts that the seed alone decides, each rollout once, whatever was killed on the way."""
    store = Store.open(run.spec.storage)
    tasks = await load_training(run.spec.tasks, store, os.environ)
    for number in range(1, run.spec.rounds + 1):
        dealt = {entry.rollout_id: entry.task.id for entry in deal(tasks, run.spec.tasks, seed=run.spec.seed, round=number)}
        made = {t.rollout_id: t async for t in read_trajectories(store, number, Kind.ROLLOUT)}
        assert {rollout_id: t.task_id for rollout_id, t in made.items()} == dealt
        for trajectory in made.values():
            drawn = [coin(run.spec.seed, number, trajectory.task_id, trajectory.rollout_id, turn.index) for turn in trajectory.turns]
            assert [turn.coin for turn in trajectory.turns] == drawn
            assert {turn.action.policy for turn in trajectory.turns if turn.actor == "student"} <= {trajectory.student}
    report = await fsck(store, deep=True)
    assert report.sound, str(report)
