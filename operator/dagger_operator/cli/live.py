"""Live progress of a supervised run: a table that redraws itself on a terminal, plain lines otherwise."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from dagger_operator.api import DAggerRun, Phase
from dagger_operator.cli.report import headline, report
from dagger_operator.store.objects import DamagedObject, Store, StoreUnavailable
from dagger_operator.store.progress import read_progress
from dagger_operator.store.results import StageProgress

STAGES: Mapping[Phase, str] = {Phase.ROLLOUT: "rollout", Phase.TRAINING: "training", Phase.EVALUATION: "evaluation"}
"""The stages that report progress, by the phase in which they run."""
PLAIN_EVERY = 15.0
"""Seconds between two lines if there is no terminal."""


def merged(reports: Mapping[int, StageProgress]) -> StageProgress | None:
    """Merge the workers' reports into a stage's progress: each sees the whole stage, and counts what it did itself."""
    if not reports:
        return None
    counters: dict[str, float] = {}
    for one in reports.values():
        for name, value in one.counters.items():
            counters[name] = counters.get(name, 0.0) + value
    furthest = max(reports.values(), key=lambda one: one.done)
    return furthest.model_copy(update={"counters": counters})


def line(run: DAggerRun, progress: StageProgress | None) -> str:
    """Return one line for a log."""
    text = headline(run).plain
    if progress is not None:
        text += f": {progress.done}/{progress.total} {progress.unit}"
        text += "".join(f", {name} {value:.4g}" for name, value in progress.counters.items())
    return text


def obstacle(run: DAggerRun) -> str:
    """Return the message of the condition that gives the run's reason; empty if that only names the current stage."""
    found = [c for c in (run.status.conditions if run.status else []) if c.reason == (run.status and run.status.reason)]
    return next((c.message for c in found if not c.reason.endswith(("Running", "Starting"))), "")


def _stage(run: DAggerRun) -> tuple[int, str] | None:
    """Return round and name of the stage that reports progress now."""
    stage = STAGES.get(run.status.phase) if run.status else None
    return (run.status.round, stage) if run.status and stage else None


class Display:
    """Shows the latest state of a run until its context ends. `show` takes the state; it never waits."""

    def __init__(self, console: Console, run: DAggerRun, store: Store) -> None:
        self._console, self._run, self._store = console, run, store
        self._progress: StageProgress | None = None
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._said, self._said_at = "", 0.0

    def show(self, run: DAggerRun) -> None:
        if _stage(run) != _stage(self._run):
            self._progress = None
        self._run = run
        self._draw()

    async def __aenter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()

    async def _read(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            shown = _stage(self._run)
            try:
                workers = self._run.spec.rollouts.workers
                progress = merged(await read_progress(self._store, *shown, workers)) if shown else None
            except (StoreUnavailable, DamagedObject):
                continue  # the supervisor sees this too, and reports it in the run's conditions
            if shown == _stage(self._run):
                self._progress = progress
            self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Group(report(self._run), self._bar()), refresh=True)
            return
        said = headline(self._run).plain
        if said != self._said and (message := obstacle(self._run)):
            self._console.print(f"  {message}", highlight=False, soft_wrap=True)
        if said != self._said or time.monotonic() - self._said_at > PLAIN_EVERY:
            self._said, self._said_at = said, time.monotonic()
            self._console.print(line(self._run, self._progress), highlight=False, soft_wrap=True)

    def _bar(self) -> Group | Progress:
        if self._progress is None:
            return Group()
        counters = ", ".join(f"{name} {value:.4g}" for name, value in self._progress.counters.items())
        bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=self._console)
        bar.add_task(f"{self._progress.unit}  {counters}", total=self._progress.total, completed=self._progress.done)
        return bar
