"""One look at a run: what stands in its way is in its status, and no object is in another's way."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.cluster import stores
from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.reconcile import Reconciler
from dagger_operator.cluster.settings import Settings
from dagger_operator.kube.errors import Conflict, Unavailable, error_of
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.results import PrepareResult, save_result
from fixtures.objects import Objects, Place

Json = dict[str, Any]
DEMO = RunKey("lab", "demo")


class Looks:
    """A run, and an operator that looks at it, which may begin anew at any time."""

    def __init__(self, run: DAggerRun) -> None:
        self.objects = Objects()
        metadata = {"name": "demo", "namespace": "lab", "uid": "demo", "generation": 1}
        self.objects.put({"apiVersion": run.api_version, "kind": run.kind, "metadata": metadata, "spec": run.spec.wire()})
        self.restart()

    def restart(self) -> None:
        self.cache = Cache()
        for one in self.objects.there.values():
            self.cache.put(one)
        self.reconciler = Reconciler(Settings(), self.cache, self.objects)  # type: ignore[arg-type]  # in a Client's place

    @property
    def stored(self) -> Json:
        return self.objects.there["DAggerRun", *DEMO]

    def edit(self, **spec: Any) -> None:
        """As a user does it; the cache hears of it."""
        metadata = {**self.stored["metadata"], "generation": self.stored["metadata"]["generation"] + 1}
        self.cache.put(self.objects.put({**self.stored, "metadata": metadata, "spec": {**self.stored["spec"], **spec}}))

    def told(self) -> list[tuple[str, str]]:
        """Type and reason of the Events, in order."""
        return [(one["type"], one["reason"]) for (kind, _, _), one in self.objects.there.items() if kind == "Event"]

    def kinds(self) -> set[str]:
        return {kind for kind, _, _ in self.objects.there} - {"DAggerRun", "Event"}

    async def look(self) -> Json:
        """The status after it."""
        self.after = await self.reconciler.reconcile(DEMO)
        status: Json = self.stored["status"]
        return status


def condition(status: Json, kind: str = "Progressing") -> Json:
    (found,) = (one for one in status["conditions"] if one["type"] == kind)
    return dict(found)


def answers(code: int, *places: tuple[str, str], **status: str) -> Callable[[str, Place], None]:
    """A fault: this answer to these verbs about these kinds."""

    def fault(verb: str, place: Place) -> None:
        if (verb, place[0]) in places:
            raise error_of(verb, code, status)

    return fault


class Clock:
    """Says what time it is where the operator asks."""

    def __init__(self) -> None:
        self.at = datetime.now(UTC)

    def now(self, zone: Any) -> datetime:
        return self.at

    def later(self, **delta: float) -> None:
        self.at += timedelta(**delta)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("apply", "observe", "reconcile"):
        monkeypatch.setattr(f"dagger_operator.cluster.{module}.datetime", clock)
    return clock


@pytest.fixture
def looks(make_run: Callable[..., DAggerRun]) -> Looks:
    return Looks(make_run())


DOWN = {"reason": "InternalError", "message": 'failed calling webhook "policy.example.org": connection refused'}


async def test_an_admission_webhook_that_is_down_is_in_the_status_and_waited_for(looks: Looks) -> None:
    looks.objects.fault = answers(500, ("apply", "Job"), **DOWN)
    status = await looks.look()
    assert (status["phase"], status["reason"], condition(status)["status"]) == ("Preparing", "InternalError", "False")
    assert "policy.example.org" in condition(status)["message"]
    assert looks.after is not None and 5 < looks.after <= 10
    looks.objects.fault = answers(500)
    assert (await looks.look())["reason"] == "StageStarting"
    assert looks.kinds() == {"Job"}


async def test_what_is_not_taken_or_removed_keeps_nothing_else_from_being_done(looks: Looks) -> None:
    await looks.look()
    labels = looks.objects.there["Job", "lab", next(name for kind, _, name in looks.objects.there if kind == "Job")]["metadata"]["labels"]
    owner = {"apiVersion": "v1", "kind": "DAggerRun", "name": "demo", "uid": "demo", "controller": True}
    for name in ("demo-r000-prepare-old1", "demo-r000-prepare-old2"):
        metadata = {"name": name, "namespace": "lab", "labels": labels, "ownerReferences": [owner]}
        looks.cache.put(looks.objects.put({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {}}))

    def fault(verb: str, place: Place) -> None:
        if (verb, place[2]) == ("delete", "demo-r000-prepare-old1"):
            raise error_of(verb, 403, {"reason": "Forbidden", "message": "not allowed"})

    looks.objects.fault = fault
    status = await looks.look()
    assert status["reason"] == "Forbidden"
    assert "demo-r000-prepare-old1 cannot be removed: not allowed" in condition(status)["message"]
    assert ("Job", "lab", "demo-r000-prepare-old2") not in looks.objects.there


@pytest.mark.parametrize("code", [401, 429])
async def test_an_api_server_that_does_not_answer_is_asked_again_later_for_everything(looks: Looks, code: int) -> None:
    looks.objects.fault = answers(code, ("apply", "Job"))
    with pytest.raises(Unavailable):
        await looks.look()
    assert "status" not in looks.stored


QUOTA = {"reason": "Forbidden", "message": "exceeded quota: none"}


async def test_a_deadline_goes_on_through_the_lives_of_an_operator(looks: Looks, clock: Clock) -> None:
    looks.stored["spec"]["preRunningDeadlineSeconds"] = 600
    looks.objects.fault = answers(403, ("apply", "Job"), **QUOTA)
    looks.restart()
    for minutes in (0, 4, 5):
        clock.later(minutes=minutes)
        looks.restart()
        assert (await looks.look())["phase"] == "Preparing"
    clock.later(minutes=2)
    looks.restart()
    failed = await looks.look()
    assert (failed["phase"], failed["reason"]) == ("Failed", "QuotaExceeded")
    clock.later(minutes=1)
    looks.restart()
    assert await looks.look() == failed, "an operator that begins anew knows as much"
    looks.objects.fault = answers(500, ("apply", "Job"), **DOWN)
    looks.restart()
    status = await looks.look()
    assert (status["phase"], status["reason"]) == ("Failed", "InternalError"), "it is not taken yet, whatever the reason"
    looks.objects.fault = answers(403)
    looks.restart()
    assert (await looks.look())["phase"] == "Preparing"


@pytest.mark.parametrize("keep", ["Logs", "Nothing"])
async def test_a_run_that_failed_by_a_refusal_makes_nothing_and_goes_on_once_all_would_be_taken(
    make_run: Callable[..., DAggerRun], clock: Clock, keep: str
) -> None:
    run = make_run()
    store = Store.open(run.spec.storage)
    await take_prefix(store, run)
    await save_result(store, 0, PrepareResult(policy="r000-base", teacher="t"))
    looks = Looks(run)
    teacher = {"model": "t", "serving": {"gpus": 1}}
    looks.edit(teacher=teacher, preRunningDeadlineSeconds=600, failurePolicy={"keep": keep})

    def no_teacher(verb: str, place: Place) -> None:
        if (verb, place[2]) == ("apply", "demo-teacher"):
            raise error_of(verb, 403, QUOTA)

    def deployments() -> dict[str, Any]:
        there = {name: one["spec"]["replicas"] for (kind, _, name), one in looks.objects.there.items() if kind == "Deployment"}
        return {name.removeprefix("demo-"): replicas for name, replicas in there.items()}

    async def again() -> Json:
        looks.restart()
        return await looks.look()

    looks.objects.fault = no_teacher
    assert (await again())["reason"] == "QuotaExceeded"
    assert deployments() == {"student": 1}
    clock.later(minutes=11)
    for _ in range(5):
        assert (await again())["phase"] == "Failed"
        clock.later(seconds=10)
    before = looks.kinds()
    for _ in range(4):
        assert (await again())["phase"] == "Failed"
        assert deployments() == {"student": 0}
        assert looks.kinds() == before
    looks.objects.fault = lambda verb, place: None
    assert (await again())["phase"] == "Preflight"
    await again()
    assert deployments() == {"student": 1, "teacher": 1}


async def test_a_deadline_goes_on_while_storage_is_away(looks: Looks, clock: Clock, tmp_path: Path) -> None:
    looks.stored["spec"]["preRunningDeadlineSeconds"] = 600
    looks.objects.fault = answers(403, ("apply", "Job"), **QUOTA)
    looks.restart()
    await looks.look()
    folder, away = tmp_path / "demo", tmp_path / "away"
    folder.rename(away)
    folder.write_text("no folder")
    clock.later(minutes=9)
    assert (await looks.look())["reason"] == "StorageUnavailable"
    folder.unlink()
    away.rename(folder)
    clock.later(minutes=2)
    assert (await looks.look())["phase"] == "Failed"


async def test_a_run_that_failed_while_storage_is_away_waits_for_it_once(
    looks: Looks, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks.stored["spec"]["activeDeadlineSeconds"] = 60
    looks.restart()
    await looks.look()
    begun = 0

    async def hangs(*_: Any) -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(3600)

    monkeypatch.setattr(stores, "_read", hangs)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.05)
    clock.later(minutes=2)
    for _ in range(3):
        assert (await looks.look())["phase"] == "Failed"
    assert begun == 1


async def test_what_the_api_server_says_at_length_leaves_room_for_since_when(looks: Looks, clock: Clock) -> None:
    looks.objects.fault = answers(403, ("apply", "Job"), reason="Forbidden", message="exceeded quota: " + "x" * 5000)
    said = condition(await looks.look())["message"]
    assert "have the quota raised" in said
    assert said.endswith(f"(since {clock.at:%Y-%m-%d %H:%M:%S} UTC)")


async def test_a_child_whose_label_somebody_took_away_gets_it_back_and_is_seen_again(looks: Looks) -> None:
    await looks.look()
    (place,) = (one for one in looks.objects.there if one[0] == "Job")
    before = looks.objects.there[place]
    changed = looks.objects.put({**before, "metadata": {**before["metadata"], "labels": {}}})
    # As a watch by labels tells it: gone, as it was, at the version of the change.
    version = changed["metadata"]["resourceVersion"]
    looks.cache.remove({**before, "metadata": {**before["metadata"], "resourceVersion": version}})
    await looks.look()
    assert looks.objects.there[place]["metadata"]["labels"] == before["metadata"]["labels"]
    assert [one["kind"] for one in looks.cache.children(DEMO)] == ["Job"]
    asked: list[str] = []
    looks.objects.fault = lambda verb, place: asked.append(place[0])
    await looks.look()
    assert "Job" not in asked, "it is as it should be, and known to be"


async def test_a_run_that_is_edited_to_what_cannot_be_run_says_so_in_one_warning(looks: Looks) -> None:
    await looks.look()
    before = looks.told()
    looks.edit(rounds=0)
    for _ in range(3):
        status = await looks.look()
    assert (status["reason"], condition(status, "Accepted")["status"]) == ("InvalidSpec", "False")
    assert looks.told() == [*before, ("Warning", "InvalidSpec")]
    looks.edit(rounds=1)
    assert condition(await looks.look(), "Accepted")["status"] == "True"


async def test_a_run_of_another_manager_is_left_alone_though_its_spec_is_not_understood(looks: Looks) -> None:
    looks.edit(managedBy="example.com/queue", rounds=0, mode="of another version")
    assert await looks.reconciler.reconcile(DEMO) is None
    assert "status" not in looks.stored
    assert looks.told() == []


async def test_a_run_that_is_edited_during_the_look_at_which_its_time_is_over_stays(
    looks: Looks, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks.edit(preRunningDeadlineSeconds=600, ttlSecondsAfterFinished=3600)
    looks.objects.fault = answers(403, ("apply", "Job"), **QUOTA)
    await looks.look()
    clock.later(minutes=11)
    assert (await looks.look())["phase"] == "Failed"
    clock.later(hours=2)
    read = stores._read

    async def edited_meanwhile(*of: Any) -> Any:
        looks.edit(ttlSecondsAfterFinished=86400)
        return await read(*of)

    with monkeypatch.context() as patched:
        patched.setattr(stores, "_read", edited_meanwhile)
        with pytest.raises(Conflict):
            await looks.look()
    assert (await looks.look())["phase"] == "Failed"
    clock.later(days=1)
    await looks.reconciler.reconcile(DEMO)
    assert ("DAggerRun", *DEMO) not in looks.objects.there


def jobs(looks: Looks) -> list[str]:
    return [name for kind, _, name in looks.objects.there if kind == "Job"]


@pytest.mark.parametrize("edit", ["spec", "retry", "another of its name", "gone"])
async def test_who_hears_late_of_an_edit_makes_no_job_for_what_the_run_was(looks: Looks, edit: str) -> None:
    """Of two that work at once the other one has removed it, and made the next."""
    before = looks.stored
    metadata = before["metadata"]
    changed = {
        "spec": {**before, "metadata": {**metadata, "generation": 2}, "spec": {**before["spec"], "image": "worker:2"}},
        "retry": {**before, "metadata": {**metadata, "annotations": {"dagger-operator.dev/retry": "1"}}},
        "another of its name": {**before, "metadata": {**metadata, "uid": "another"}},
        "gone": None,
    }[edit]
    if changed is None:
        del looks.objects.there["DAggerRun", *DEMO]
    else:
        looks.objects.put(changed)
    with pytest.raises(Conflict):
        await looks.look()
    assert jobs(looks) == []
    if changed is not None:
        await looks.look()
        assert len(jobs(looks)) == 1, "it knows the run by now"


async def test_a_run_is_read_once_for_each_job_that_is_made_and_not_at_every_look(looks: Looks) -> None:
    asked: list[Place] = []
    looks.objects.fault = lambda verb, place: asked.append(place) if verb == "get" else None
    await looks.look()
    assert [place[0] for place in asked] == ["Job", "DAggerRun"]
    asked.clear()
    await looks.look()
    assert asked == []


async def test_what_was_refused_is_not_held_against_another_run_of_the_same_name(looks: Looks, clock: Clock) -> None:
    looks.edit(preRunningDeadlineSeconds=600)
    looks.objects.fault = answers(403, ("apply", "Job"), **QUOTA)
    await looks.look()
    clock.later(minutes=11)
    another = {**looks.stored, "metadata": {**looks.stored["metadata"], "uid": "another"}, "status": None}
    looks.objects.there.clear()
    looks.cache.put(looks.objects.put(another))
    assert (await looks.look())["phase"] == "Preparing"
