"""The quickstart by `kubectl apply`: real vLLM, pods as sandboxes, a DeepSpeed Job of two nodes, time-shared with the server, real S3.

The operator is killed in each of its stages, other pods of it are taken away, and a real Prometheus scrapes them all.
"""

import itertools
from typing import Any

import pytest

from fixtures.on_cluster import Jobs, Killing

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2700)]

SMALL = {"requests": {"cpu": "100m", "memory": "256Mi"}}


def _smaller(document: dict[str, Any]) -> dict[str, Any]:
    """The sample's run, as a node of two cores does it in minutes."""
    spec = document["spec"]
    spec["rounds"] = 2
    spec["mixing"]["beta"]["values"] = [1.0, 0.0]
    spec["tasks"] |= {"firstRound": 48, "perRound": 16, "heldOut": {**spec["tasks"]["heldOut"], "count": 20}}
    spec["student"]["serving"]["pod"] = {"resources": SMALL}
    spec["rollouts"] = {"workers": 1, "concurrency": 6, "leaseSeconds": 15, "pod": {"resources": SMALL}}
    spec["training"] |= {"steps": {"type": "List", "values": [300, 200]}, "checkpointEverySteps": 50, "pod": {"resources": SMALL}}
    spec["training"] |= {"nodes": 2, "processesPerNode": 1}  # pods that find each other by name
    spec["gpuSharing"] = "TimeShared"
    spec["sandbox"]["limits"]["cpus"] = 0.5
    return document


def test_the_chart_answers_for_itself(helm_test: Any) -> None:
    assert "Succeeded" in helm_test()


def test_a_student_learns_on_a_cluster_whatever_is_taken_from_it(installation: Any, scraping: Any, documented_metrics: Any) -> None:
    installation.apply(*installation.sample("inputs.yaml"))
    installation.kubectl("wait", "--for=condition=Complete", "--timeout=300s", "job/quickstart-inputs", timeout=310)
    (document,) = installation.sample("run.yaml")
    installation.apply(_smaller(document))

    def at(number: int, phase: str) -> bool:
        status = installation.run("quickstart").get("status", {})
        assert status.get("phase") != "Failed", installation.told()
        return bool((status.get("round"), status.get("phase")) == (number, phase) and _running(installation, phase))

    with Jobs(installation, "quickstart") as jobs, Killing(installation, "quickstart") as killing:
        installation.until("round 2 begins", lambda: at(2, "Rollout"), 1500)
        looks = itertools.count()
        count = "sum(max_over_time(dagger_infrastructure_failures_total[1h]))"
        before = scraping.prometheus.value(count) or 0

        def gone_and_counted() -> Any:
            if next(looks) % 8 == 0:  # again where those that went had just done their work: nobody misses them
                installation.kill_sandboxes()
            return (scraping.prometheus.value(count) or 0) > before

        installation.until("its worker counts the sandboxes that are gone", gone_and_counted, 120)
        _delete(installation, "rollout")
        _delete(installation, "student")
        installation.until("both nodes of round 2 train", lambda: at(2, "Training") and len(_running(installation, "training")) == 2, 900)
        assert installation.listed("pods", "dagger-operator.dev/component=student") == [], "the server left before training came"
        _delete(installation, "training")
        run = installation.ended("quickstart", 1200)

    first, last = run["status"]["rounds"]
    assert first["training"]["lastLoss"] < first["training"]["firstLoss"] / 5
    assert first["rollout"]["outcomes"] == {"Resolved": 48}
    assert last["evaluation"]["resolved"] > 0
    assert last["evaluation"]["resolvedRate"] >= first["evaluation"]["resolvedRate"]
    assert _submits_what_it_repaired(first["evaluation"], last["evaluation"])
    assert [entry["evaluation"]["policy"] for entry in (first, last)] == [entry["training"]["checkpoint"] for entry in (first, last)]
    assert first["evaluation"]["policy"] != last["evaluation"]["policy"]
    assert last["rollout"]["teacherTurnShare"] == 0 and first["rollout"]["teacherTurnShare"] == 1
    assert [entry["rollout"]["rollouts"] for entry in (first, last)] == [48, 16]
    installation.kubectl("wait", "--for=condition=Succeeded", "--timeout=1s", "daggerrun/quickstart")
    # Pods were taken from three of them: a Job replaces its own, so another one for the same stage would do its work a second time.
    stages = [(number, stage) for number in (1, 2) for stage in ("rollout", "training", "publish", "evaluation")]
    assert {step: len(uids) for step, uids in jobs.seen.items()} == dict.fromkeys([(0, "prepare"), (0, "preflight"), *stages], 1)
    assert killing.killed.keys() == {"prepare", "serving", "preflight", "rollout", "training", "publish", "evaluation"}
    assert len(set(killing.killed.values())) == len(killing.killed), "each time it was another, living one"
    end = 'max(max_over_time(dagger_run_info{phase="Succeeded",run="quickstart"}[1h]))'
    installation.until("Prometheus sees the end", lambda: scraping.prometheus.value(end) == 1, 60)
    _all_metrics_were_scraped(scraping.prometheus, documented_metrics)
    installation.all_is_sound("quickstart")
    installation.nothing_is_left("quickstart")


UNHARMED = {f"dagger_gateway_{what}_total has no samples" for what in ("retries", "failures")}
"""Nobody makes a policy fail here; tests/e2e/test_metrics.py does."""


def _all_metrics_were_scraped(prometheus: Any, documented: Any) -> None:
    sections = {"operator": ("Operator",), "worker": ("Worker", "Gateway"), "trainer": ("Trainer",), "agent": ("Policy agent",)}
    for job, its in sections.items():
        assert set(documented.differences(prometheus.series(job), *its)) <= UNHARMED, job


def _running(installation: Any, phase: str) -> list[dict[str, Any]]:
    component = phase.lower()
    pods = installation.listed("pods", f"dagger-operator.dev/component={component}")
    return [pod for pod in pods if pod["status"].get("phase") == "Running"]


def _delete(installation: Any, component: str) -> None:
    installation.kill(installation.namespace, f"dagger-operator.dev/component={component}")


def _submits_what_it_repaired(first: Any, last: Any) -> bool:
    """In round 1 the student imitates an expert that is always right, and submits what it did not repair; DAgger shows it its own states.
    With 16 rollouts and 20 held-out tasks no margin of the resolved rate would be safe to ask for."""
    return bool(last["falseSubmits"] < first["falseSubmits"] or last["falseSubmits"] <= 0.1 * last["tasks"])
