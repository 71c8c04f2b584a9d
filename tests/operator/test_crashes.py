"""Operators that are killed, doubled, frozen, and an API server that goes away: every run still ends well, and nothing is made twice."""

import asyncio
import contextlib
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Json = dict[str, Any]


def made_once(lab: Any) -> bool:
    """No Job was ever made a second time: a training Job that is holds GPUs twice."""
    doubled = [name for name, times in Counter(lab.jobs.values()).items() if times > 1]
    stages = Counter(tuple(name.split("-")[1:3]) for name in lab.jobs.values())
    assert not doubled, f"made again under the same name: {doubled}"
    assert max(stages.values()) == 1, f"made again under another: {stages}"
    return True


async def test_killed_at_any_point_again_and_again(lab: Any, make_operator: Callable[..., Any]) -> None:
    operator, chance = make_operator(lease="-"), random.Random(5)
    await lab.create(rounds=3)  # long enough for some lives on a quick machine too
    finished = asyncio.create_task(lab.until_phase("Succeeded", seconds=300))
    lives = 0
    while not finished.done():
        operator.start()
        lives += 1
        # A process needs a second or two until it works; from then on any moment is as good as another.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(finished), chance.uniform(2.0, 6.0))
        operator.kill()
    await finished
    assert lives > 2
    assert made_once(lab)


async def test_two_at_once_without_a_lease(lab: Any, make_operator: Callable[..., Any]) -> None:
    for operator in (make_operator(lease="-"), make_operator(lease="-")):
        operator.start()
    await lab.create()
    await lab.until_phase("Succeeded")
    assert made_once(lab)


class Record:
    """All that ever was, by a watch: the Jobs made under each name, and the steps of which two attempts had pods at the same time."""

    def __init__(self) -> None:
        self.jobs: defaultdict[str, set[str]] = defaultdict(set)
        self.together: set[tuple[str, ...]] = set()
        self._pods: dict[str, tuple[tuple[str, ...], str]] = {}

    async def keep(self, lab: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(lab, "/apis/batch/v1", "jobs", self._job))
            group.create_task(self._watch(lab, "/api/v1", "pods", self._pod))

    async def _watch(self, lab: Any, api: str, plural: str, hear: Callable[[str, Json], None]) -> None:
        async for event, one in lab.client._api.watch(f"{api}/namespaces/{lab.namespace}/{plural}", {}, "0"):
            if event != "BOOKMARK":
                hear(event, one)

    def _job(self, _: str, job: Json) -> None:
        self.jobs[job["metadata"]["name"]].add(job["metadata"]["uid"])

    def _pod(self, event: str, pod: Json) -> None:
        run, step, number, attempt = (
            pod["metadata"]["labels"][f"dagger-operator.dev/{name}"] for name in ("run", "component", "round", "attempt")
        )
        if event == "DELETED" or pod["status"].get("phase") in ("Succeeded", "Failed"):
            self._pods.pop(pod["metadata"]["uid"], None)
            return
        self._pods[pod["metadata"]["uid"]] = (run, step, number), attempt
        attempts = {made for of, made in self._pods.values() if of == (run, step, number)}
        if len(attempts) > 1:
            self.together.add((run, step, number, *sorted(attempts)))


async def test_two_at_once_without_a_lease_beside_edits_suspension_and_a_retry(lab: Any, make_operator: Callable[..., Any]) -> None:
    record, chance = Record(), random.Random(7)
    recording = asyncio.create_task(record.keep(lab))
    for operator in (make_operator(lease="-"), make_operator(lease="-")):
        operator.start()
    lab.paused = {"rollout"}
    await lab.create_short(rounds=2)
    await lab.until_job("rollout")
    for concurrency in range(2, 8):
        await lab.edit(rollouts={"concurrency": concurrency})
        await asyncio.sleep(chance.uniform(0.0, 1.5))
    await lab.edit(suspend=True)
    await asyncio.sleep(chance.uniform(0.0, 1.0))
    await lab.edit(suspend=False)
    await lab.edit(suspend=True)
    await lab.until_phase("Suspended")
    await lab.edit(suspend=False, rollouts={"concurrency": 8})
    lab.paused, lab.failing = set(), {"rollout"}
    await lab.until_phase("Failed")
    lab.failing = set()
    head = {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun"}
    metadata = {"name": "demo", "namespace": lab.namespace, "annotations": {"dagger-operator.dev/retry": "1"}}
    await lab.client.patch({**head, "metadata": metadata})
    await lab.until_phase("Succeeded")
    assert not recording.done()
    recording.cancel()
    assert {name: uids for name, uids in record.jobs.items() if len(uids) > 1} == {}, "an attempt of a step was made twice"
    assert record.together == set()
    steps = Counter(tuple(name.split("-")[1:3]) for name in record.jobs)
    assert steps["r001", "rollout"] > 3, "it was edited while it worked"
    assert {step: times for step, times in steps.items() if times > 1}.keys() == {("r001", "rollout")}


async def test_a_standby_takes_over_and_a_leader_that_was_frozen_ends(lab: Any, make_operator: Callable[..., Any]) -> None:
    first, second = make_operator(), make_operator()
    first.start()

    async def leads(one: Any) -> bool:
        return "dagger_operator_leading 1.0" in one.metrics()

    await lab.until(lambda: leads(first))
    second.start()
    await lab.until(lambda: ready(second))
    assert second.ask("/readyz") == (200, "ok (standby)")
    first.process.send_signal(signal.SIGSTOP)
    await lab.create_short()
    await lab.until(lambda: leads(second))
    first.process.send_signal(signal.SIGCONT)
    await lab.until(lambda: ended(first))
    assert first.process.returncode == 1
    await lab.until_phase("Succeeded")
    assert made_once(lab)

    first.start()
    await lab.until(lambda: ready(first))
    assert second.stop() == 0
    await lab.until(lambda: leads(first), seconds=12)


async def ready(operator: Any) -> bool:
    return bool(operator.ask("/readyz")[0] == 200)


async def ended(operator: Any) -> bool:
    return operator.process.poll() is not None


async def test_somebody_who_edits_the_run_all_the_time_does_not_stop_it(lab: Any, make_operator: Callable[..., Any]) -> None:
    make_operator(lease="-").start()
    await lab.create_short()

    async def edit() -> None:
        for number in range(10_000):
            head = {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun"}
            metadata = {"name": "demo", "namespace": lab.namespace, "annotations": {"example.com/number": str(number)}}
            await lab.client.patch({**head, "metadata": metadata})
            await asyncio.sleep(0.05)

    editing = asyncio.create_task(edit())
    await lab.until_phase("Succeeded")
    editing.cancel()
    assert made_once(lab)


async def test_a_run_can_be_deleted_while_no_operator_lives(lab: Any, make_operator: Callable[..., Any]) -> None:
    operator = make_operator()
    operator.start()
    lab.paused = {"rollout"}
    await lab.create()
    await lab.until_job("rollout")
    operator.kill()
    await lab.delete()

    async def gone() -> bool:
        kinds = [("batch/v1", "Job"), ("apps/v1", "Deployment"), ("v1", "Service"), ("v1", "Pod")]
        return not [one for kind in kinds for one in await lab.objects(*kind)]

    await lab.until(gone)


async def test_the_api_server_goes_away_and_comes_back(lab: Any, make_operator: Callable[..., Any], control_plane: Any) -> None:
    operator = make_operator()
    operator.start()
    lab.paused = {"rollout"}
    await lab.create()
    await lab.until_job("rollout")
    server = api_server(control_plane.kubeconfig.parent)
    server.kill()

    async def answers() -> bool:
        return await _answers(lab)

    await lab.until(answers)
    lab.paused = set()
    await lab.until_phase("Succeeded")
    assert operator.process.poll() is None, "it needed no new life"
    assert made_once(lab)


async def _answers(lab: Any) -> bool:
    try:
        await lab.run()
    except Exception:
        return False
    return True


def api_server(folder: Path) -> psutil.Process:
    """The test's own one: its certificates lie in the test's folder."""
    return next(
        one
        for one in psutil.process_iter(["name", "cmdline"])
        if one.info["name"] == "kube-apiserver" and any(str(folder) in part for part in one.info["cmdline"])
    )


async def test_at_rest_it_holds_little_memory(lab: Any, make_operator: Callable[..., Any]) -> None:
    operator = make_operator(lease="-")
    operator.start()
    await lab.until(lambda: ready(operator))
    assert psutil.Process(operator.process.pid).memory_info().rss < 120 * 2**20
