"""Measures how the operator's cost grows with the number of runs, on a real API server with KWOK's nodes and pods.

    python benchmarks/scale.py [--runs 50,100,200,400,1000] [--json FILE] [--ranges FILE]

For each number of runs on a fresh cluster: a *burst* (all runs are created at once, and go through prepare and preflight to their rollouts
of ten pods), *steady* (nothing changes for a while), a *restart* (the operator is killed, and a new process finds everything there),
*moving* (every run gains a percent every ten seconds). Exits with 1 if a figure is outside its range in `scale.ranges.yaml`.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from scale_cluster import ScaleCluster, scale_cluster
from scale_operator import Operator, Reading, quantile
from scale_ranges import Figures, judged, table
from scale_runs import NAMESPACE, Runs

from dagger_operator.cluster.reconcile import LOOKS_A_SECOND
from dagger_operator.cluster.stores import PROGRESS_A_SECOND
from dagger_operator.control.plan import LOOK_AGAIN

HERE = Path(__file__).resolve().parent
SECONDS = 40.0
"""Duration of the phases that wait for nothing."""
PATIENCE = 1200.0
GOAL = 0.1
"""Seconds within which a reconcile should be done."""


async def measure(count: int, log: Path | None) -> Figures:
    with scale_cluster() as cluster, tempfile.TemporaryDirectory(prefix="dagger-scale-store-") as folder:
        cluster.kubectl("create", "namespace", NAMESPACE)
        operator = Operator(cluster.kubeconfig, log or Path(folder) / "operator.log")
        async with Runs.at_work(cluster.kubeconfig, Path(folder)) as runs:
            operator.start()
            try:
                await until(lambda: operator.ready)
                figures: Figures = {"runs": count, "load average before": os.getloadavg()[0]}
                figures |= await burst(operator, cluster, runs, count)
                figures |= await steady(operator, count)
                figures |= counted(cluster, count)
                operator.kill()
                figures |= await restart(operator, count)
                return figures | await moving(operator, runs, count)
            finally:
                operator.kill()


async def burst(operator: Operator, cluster: ScaleCluster, runs: Runs, count: int) -> Figures:
    before = operator.read()
    await runs.make(count)
    await until(lambda: operator.read().phases.get("Rollout") == count and not cluster.pending(NAMESPACE), every=2)
    took = operator.read().since(before)
    return {
        "burst seconds": took.at,
        "burst cpu seconds": took.cpu,
        **looks("burst", took),
        "burst reads per run": took.reads / count,
        "burst writes per run": took.writes / count,
    }


async def steady(operator: Operator, count: int) -> Figures:
    """Wait until nothing is written any more, for as long as it takes to reconcile every run and read its progress; then measure."""
    seen = [operator.read()]

    async def quiet() -> bool:
        await asyncio.sleep(LOOK_AGAIN + count / LOOKS_A_SECOND + count / PROGRESS_A_SECOND)
        seen.append(operator.read())
        return seen[-1].writes == seen[-2].writes

    await until(quiet)
    before = operator.read()
    await asyncio.sleep(SECONDS)
    took = operator.read().since(before)
    return {
        "steady looks per second": took.looks / took.at,
        "steady cpu share": took.cpu / took.at,
        **looks("steady", took),
        "steady reads per second": took.reads / took.at,
        "steady writes": took.writes,
        "memory MiB": operator.memory,
    }


async def restart(operator: Operator, count: int) -> Figures:
    began = time.monotonic()
    operator.start()
    await until(lambda: operator.ready)
    ready = time.monotonic() - began
    await until(lambda: operator.read().looks >= count)
    now = operator.read()
    return {
        "restart ready seconds": ready,
        "restart seconds": time.monotonic() - began,
        "restart cpu seconds": now.cpu,
        "restart reads per run": now.reads / count,
        "restart writes": now.writes,
        "restart memory MiB": operator.memory,
    }


async def moving(operator: Operator, runs: Runs, count: int) -> Figures:
    async with runs.gaining():
        before = operator.read()
        await asyncio.sleep(SECONDS)
        took = operator.read().since(before)
    return {
        "moving cpu share": took.cpu / took.at,
        **looks("moving", took),
        "moving writes per run and minute": took.writes / count / took.at * 60,
    }


def looks(name: str, took: Reading) -> Figures:
    return {
        f"{name} looks": took.looks,
        f"{name} look p50 ms": 1000 * quantile(took.reconciles, 0.5),
        f"{name} look p95 ms": 1000 * quantile(took.reconciles, 0.95),
        f"{name} looks within goal": took.reconciles.get(GOAL, 0.0) / max(1.0, took.looks),
        f"{name} wait p95 ms": 1000 * quantile(took.waits, 0.95),
    }


def counted(cluster: ScaleCluster, count: int) -> Figures:
    """Return what the API server counted as written: only the operator uses server-side apply."""
    applied, children = cluster.applied(), cluster.children()
    status = applied.get(("daggerruns", "status"), 0)
    return {
        "pods": cluster.pods(),
        "children per run": children / count,
        "applies per child": (sum(applied.values()) - status) / children,
        "status writes per run": status / count,
    }


async def until(true: Callable[[], bool | Awaitable[bool]], every: float = 0.2) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE:.0f} s")
        await asyncio.sleep(every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="50,100,200,400,1000", help="numbers of runs, each on a fresh cluster; empty: none")
    parser.add_argument("--json", type=Path, help="a file for all figures; sizes that are there are not measured again")
    parser.add_argument("--ranges", type=Path, default=HERE / "scale.ranges.yaml", help="what the figures are held against")
    parser.add_argument("--log", type=Path, help="a file for the operator's log")
    options = parser.parse_args()
    measured: list[Figures] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for count in map(int, filter(None, options.runs.split(","))):
        if any(one["runs"] == count for one in measured):
            continue
        measured = sorted([*measured, asyncio.run(measure(count, options.log))], key=lambda one: one["runs"])
        print(f"{count} runs are measured", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
    verdict, kept = judged(measured, options.ranges)
    print(f"\n{verdict}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
