"""Compares DAgger with behaviour cloning at the same number of labels and optimiser steps, over several seeds.

    python examples/quickstart/experiment.py --seeds 1 2 3 4 5

Both arms are the quickstart's DAggerRun. Behaviour cloning is the same resource with beta = 1 in every round; its later
rounds take as many tasks as equalise the number of labels, since a teacher needs five turns per task. Batches are counted in
labels, so both arms see the same number of labels in the same number of steps, at the same learning rates. The seed determines
tasks, held-out tasks, the student's initial weights, coins and batches. Finished arms are kept: an interrupted experiment
resumes where it stopped.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from dagger_operator.api import Storage
from dagger_operator.evaluation.statistics import Comparison, compare, mcnemar, wilson
from dagger_operator.store.objects import Store
from dagger_operator.store.results import EvaluationResult, RolloutResult, TrainingResult, read_result
from run import PORT, daggerctl, make_inputs, manifest_for, serving_teacher

FOLDER = Path(".dagger/experiment")
HELD_OUT = 200
TRAIN = 1200
TEACHER_TURNS = 5
"""Turns, and so labels, that the teacher needs per task."""
# Two-sided 95 % quantiles of Student's t by number of seeds.
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Arm:
    """The results of an arm, by round."""

    rollouts: tuple[RolloutResult, ...]
    trainings: tuple[TrainingResult, ...]
    evaluations: tuple[EvaluationResult, ...]

    @property
    def labels(self) -> int:
        return sum(result.summary.labels for result in self.rollouts)

    @property
    def steps(self) -> int:
        return sum(result.summary.steps for result in self.trainings)

    @property
    def rates(self) -> str:
        return " ".join(f"{result.summary.resolved_rate:.2f}" for result in self.evaluations)

    @property
    def false_submits(self) -> float:
        last = self.evaluations[-1].summary
        return last.false_submits / last.tasks


@dataclass(frozen=True)
class Pair:
    """Both arms of one seed."""

    seed: int
    dagger: Arm
    cloning: Arm

    @property
    def comparison(self) -> Comparison:
        return compare(candidate=self.dagger.evaluations[-1], reference=self.cloning.evaluations[-1])


def manifest(quickstart: Path, seed: int, arm: str, *, later_tasks: int | None = None) -> dict[str, Any]:
    """Return the quickstart's resource for one arm and seed: cloning if `later_tasks` gives the tasks per round after the first."""
    document: dict[str, Any] = yaml.safe_load(quickstart.read_text())
    folder = f"./{FOLDER}/seed-{seed}"
    document["metadata"]["name"] = f"experiment-{arm}-{seed}"
    spec = document["spec"]
    spec["seed"] = seed
    spec["student"]["model"] = f"{folder}/student"
    spec["tasks"]["source"]["uri"] = spec["tasks"]["heldOut"]["source"]["uri"] = f"{folder}/tasks.jsonl"
    spec["storage"]["url"] = f"file://{folder}/{arm}"
    if later_tasks is not None:
        spec["mixing"] = {"strategy": "PerTurn", "beta": {"type": "Constant", "value": 1.0}}
        spec["tasks"]["perRound"] = later_tasks
    return document


def run_arm(document: dict[str, Any]) -> Arm:
    """Run one arm to its end, if it has not finished yet, and read its results."""
    path = FOLDER / f"{document['metadata']['name']}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    code = daggerctl("run", path)
    if code != 0:
        sys.exit(code)
    url = f"file://{Path(document['spec']['storage']['url'].removeprefix('file://')).resolve()}"
    return asyncio.run(read_arm(Store.open(Storage(url=url)), document["spec"]["rounds"]))


async def read_arm(store: Store, rounds: int) -> Arm:
    """Return all results of a finished run."""

    async def results(kind: Any) -> tuple[Any, ...]:
        found = [await read_result(store, number, kind) for number in range(1, rounds + 1)]
        if None in found:
            raise SystemExit(f"error: {store.url} has no result of {kind.stage} in round {found.index(None) + 1}")
        return tuple(found)

    return Arm(
        await results(RolloutResult),
        await results(TrainingResult),
        await results(EvaluationResult),
    )


def run_pair(quickstart: Path, seed: int) -> Pair:
    make_inputs(FOLDER / f"seed-{seed}", seed, train=TRAIN, held_out=HELD_OUT)
    dagger = run_arm(manifest(quickstart, seed, "dagger"))
    later = [result.summary.labels for result in dagger.rollouts[1:]]
    cloning = run_arm(manifest(quickstart, seed, "cloning", later_tasks=round(fmean(later) / TEACHER_TURNS)))
    return Pair(seed, dagger, cloning)


def report(pairs: Sequence[Pair]) -> str:
    """Return the result as Markdown, whatever the outcome."""
    differences = [pair.comparison.difference for pair in pairs]
    mean = fmean(differences)
    interval = "no interval from one seed"
    if len(pairs) > 1:
        half = T95[len(pairs)] * stdev(differences) / sqrt(len(pairs))
        interval = f"95 % interval {mean - half:+.3f} to {mean + half:+.3f}"
    only_cloning = sum(pair.comparison.only_reference for pair in pairs)
    only_dagger = sum(pair.comparison.only_candidate for pair in pairs)
    dagger, cloning = _pooled([pair.dagger for pair in pairs]), _pooled([pair.cloning for pair in pairs])
    return f"""\
# DAgger against behaviour cloning

Made by `make experiment` (`examples/quickstart/experiment.py`), written as it came out. Every seed that was run is listed.

Both arms are the quickstart's resource: the same student at the start, the same number of labels, of optimiser steps and of
labels in a batch, the same learning rates, {HELD_OUT} held-out tasks of unseen pairs of module and name. The cloning arm sets
beta = 1 in every round, so that its labels come from the teacher's own states only, and gets as many tasks as make the
labels equal: it sees more different tasks than the DAgger arm.

| seed | DAgger by round | cloning by round | difference (95 % interval) | McNemar p | false submits DAgger / cloning | labels | steps |
|---|---|---|---|---|---|---|---|
{"".join(_row(pair) for pair in pairs)}
Mean difference over {len(pairs)} seeds: **{mean:+.3f}** ({interval}; Student's t, one observation a seed).

All seeds together: DAgger resolved {dagger}, cloning {cloning}. {only_dagger} tasks were resolved by DAgger alone,
{only_cloning} by cloning alone (McNemar's exact test, p = {mcnemar(only_cloning, only_dagger):.2g}).

A false submit is a task that the student declared done and that is not. The interval of a seed is a paired bootstrap over its
tasks; it says nothing about other seeds, which the interval of the mean does.
"""


def _pooled(arms: Sequence[Arm]) -> str:
    last = [arm.evaluations[-1].summary for arm in arms]
    resolved, tasks = sum(summary.resolved for summary in last), sum(summary.tasks for summary in last)
    low, high = wilson(resolved, tasks)
    return f"{resolved} of {tasks} ({low:.3f} to {high:.3f})"


def _row(pair: Pair) -> str:
    c = pair.comparison
    return (
        f"| {pair.seed} | {pair.dagger.rates} | {pair.cloning.rates} "
        f"| {c.difference:+.3f} ({c.interval[0]:+.3f} to {c.interval[1]:+.3f}) | {c.p_value:.2g} "
        f"| {pair.dagger.false_submits:.3f} / {pair.cloning.false_submits:.3f} "
        f"| {pair.dagger.labels} / {pair.cloning.labels} | {pair.dagger.steps} / {pair.cloning.steps} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--port", type=int, default=PORT, help="where the teacher listens")
    parser.add_argument("--out", type=Path, default=Path("docs/experiment.md"))
    options = parser.parse_args()
    if len(options.seeds) > max(T95):
        parser.error(f"at most {max(T95)} seeds")
    FOLDER.mkdir(parents=True, exist_ok=True)
    pairs = []
    with serving_teacher(FOLDER / "teacher.log", options.port):
        for seed in options.seeds:
            pairs.append(run_pair(manifest_for(options.port), seed))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(report(pairs))
            print(report(pairs))


if __name__ == "__main__":
    main()
