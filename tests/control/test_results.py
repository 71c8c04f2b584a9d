"""Reading a run's results, whatever its storage answers."""

import asyncio
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.control import Results, read_results
from dagger_operator.control import results as results_module
from dagger_operator.store.credentials import Keys
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.owner import owner_of, take_prefix
from dagger_operator.store.results import EvaluationResult, PrepareResult, TrainingResult, save_result
from fixtures.recorder import recording, saying
from fixtures.results import result


async def test_a_store_that_has_results_of_every_round_is_read_to_the_runs_last(make_run: Callable[..., DAggerRun]) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        where = re.search(r"/rounds/(\d+)/results/(\w+)\.json", handler.path)
        record: Any = result(where[2], int(where[1])) if where else owner_of(run)
        saying(200, record.model_dump_json().encode())(handler)

    with recording(answer) as server:
        run = make_run(storage={"url": "s3://bucket/run", "endpointUrl": server.url}, rounds=3)
        store = Store.open(run.spec.storage, Keys({"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}, "Secret keys"))
        results = await asyncio.wait_for(read_results(store, run), 60)
        assert {number for number, _ in results.records} == {0, 1, 2, 3}
        assert len(server.asked) == 1 + len(results.records)
        assert await asyncio.wait_for(read_results(store, run, results), 60) == results


async def test_results_are_kept_without_the_lists_that_no_plan_reads(make_run: Callable[..., DAggerRun], tmp_path: Any) -> None:
    run = make_run(storage={"url": f"file://{tmp_path}"}, rounds=1)
    store = Store.open(run.spec.storage)
    await take_prefix(store, run)
    trained, evaluated = result("training", 1), result("evaluation", 1)
    await save_result(store, 1, trained.model_copy(update={"losses": (1.0,) * 1000}))
    await save_result(store, 1, evaluated.model_copy(update={"resolved_tasks": ("a",), "unresolved_tasks": ("b",) * 1000}))
    await save_result(store, 0, PrepareResult(policy="p", teacher="t"))
    results = await read_results(store, run)
    assert results.get(TrainingResult, 1) == trained.model_copy(update={"losses": ()})
    assert results.get(EvaluationResult, 1) == evaluated.model_copy(update={"resolved_tasks": (), "unresolved_tasks": ()})
    assert results.size < 5000


async def test_more_results_than_a_run_can_have_are_damage(
    make_run: Callable[..., DAggerRun], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(storage={"url": f"file://{tmp_path}"}, rounds=3)
    store = Store.open(run.spec.storage)
    await take_prefix(store, run)
    for number, stage in ((0, "prepare"), (1, "publish"), (2, "publish"), (3, "publish")):
        await save_result(store, number, result(stage, number))
    first = await read_results(store, run.model_copy(update={"spec": run.spec.model_copy(update={"rounds": 1})}))
    monkeypatch.setattr(results_module, "RUN_BYTES", first.size)
    for known in (Results(), first):
        with pytest.raises(DamagedObject, match=r"^rounds/0002: the results up to here have .* bytes, where .* at most are expected"):
            await read_results(store, run, known)
