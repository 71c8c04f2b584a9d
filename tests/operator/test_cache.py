"""What is known of the cluster, from events and answers in any order."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.cluster.cache import Cache, Id, RunKey, slim

Json = dict[str, Any]
KEY = RunKey("lab", "demo")


def job(version: int, uid: str = "u1", name: str = "demo-r001-rollout-x", **labels: str) -> Json:
    metadata = {"namespace": "lab", "name": name, "uid": uid, "resourceVersion": str(version)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, "labels": {"dagger-operator.dev/run": "demo", **labels}},
        "spec": {},
    }


@given(st.permutations([job(1), job(2), job(3), job(9), job(10)]))
def test_the_newest_version_wins_in_any_order(versions: list[Json]) -> None:
    cache = Cache()
    for one in versions:
        cache.put(one)
    assert [one["metadata"]["resourceVersion"] for one in cache.children(KEY)] == ["10"]


@given(st.permutations(["made", "event", "deleted", "late answer"]))
def test_an_answer_that_comes_late_brings_nothing_back(order: list[str]) -> None:
    cache = Cache()
    for what in order:
        match what:
            case "made":
                cache.put(job(1))
            case "event":
                cache.put(job(2))
            case "deleted":
                cache.remove(job(3))
            case _:
                cache.put(job(2))
    assert cache.children(KEY) == []


@given(st.permutations(["made", "label taken away", "label put back"]))
def test_an_object_that_lost_its_label_for_a_moment_is_known_again(order: list[str]) -> None:
    cache = Cache()
    for what in order:
        match what:
            case "made":
                cache.put(job(1))
            case "label taken away":
                cache.remove(job(2))  # so a watch by labels tells it
            case _:
                cache.put(job(3))
    assert [one["metadata"]["resourceVersion"] for one in cache.children(KEY)] == ["3"]


@given(st.permutations(["not found", "made", "late answer"]))
def test_what_was_asked_for_and_not_found_is_brought_back_by_nothing(order: list[str]) -> None:
    cache = Cache()
    for what in order:
        match what:
            case "not found":
                cache.remove(job(1), not_found=True)
            case "made":
                cache.put(job(1))
            case _:
                cache.put(job(2))
    cache.remove(job(1))
    cache.put(job(2))
    assert cache.children(KEY) == []


def test_a_later_object_of_the_same_name_outlives_the_deletion_of_the_earlier_one() -> None:
    cache = Cache()
    cache.put(job(1, uid="old"))
    cache.put(job(5, uid="new"))
    cache.remove(job(4, uid="old"))
    assert [one["metadata"]["uid"] for one in cache.children(KEY)] == ["new"]


def test_only_news_concern_a_run() -> None:
    cache = Cache()
    assert cache.put(job(2)) == KEY
    assert cache.put(job(2)) is None
    assert cache.put(job(1)) is None


def test_a_child_in_another_namespace_says_whose_it_is() -> None:
    cache = Cache()
    binding = job(1, **{"dagger-operator.dev/run-namespace": "lab"}) | {"kind": "RoleBinding"}
    binding["metadata"] |= {"namespace": "sandboxes"}
    assert cache.put(binding) == KEY
    assert len(cache.children(KEY)) == 1


def test_a_label_that_was_taken_away_ends_the_membership() -> None:
    cache = Cache()
    cache.put(job(1))
    changed = job(2)
    changed["metadata"]["labels"] = {}
    cache.put(changed)
    assert cache.children(KEY) == []
    assert cache.get(Id("Job", "lab", "demo-r001-rollout-x")) is not None


def test_a_fresh_list_shows_what_went_unseen() -> None:
    now = 0.0
    cache = Cache(clock=lambda: now)
    for name in ("a", "b"):
        cache.put(job(1, uid=name, name=name))
    now = 10.0
    cache.put(job(1, uid="b", name="b"))
    assert [one["metadata"]["name"] for one in cache.unheard("Job", "lab", since=5.0)] == ["a"]
    assert cache.unheard("Job", "elsewhere", since=5.0) == []
    assert cache.unheard("Pod", None, since=5.0) == []


def test_what_nobody_reads_is_not_kept() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "lab", "name": "p", "managedFields": [{"manager": "x"}], "labels": {"a": "b"}},
        "spec": {
            "nodeName": "n",
            "volumes": [{}],
            "containers": [{"name": "c", "env": [{}], "resources": {"limits": {"nvidia.com/gpu": "1"}}}],
        },
        "status": {
            "phase": "Running",
            "hostIP": "10.0.0.1",
            "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "c", "imageID": "sha256:1", "restartCount": 2, "state": {"running": {}}}],
        },
    }
    kept = slim(pod)
    assert kept["spec"] == {"nodeName": "n", "containers": [{"name": "c", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]}
    assert "managedFields" not in kept["metadata"]
    assert kept["status"] == {
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": [{"name": "c", "restartCount": 2, "state": {"running": {}}}],
    }
    assert pod["metadata"]["managedFields"], "what was given is not changed"
