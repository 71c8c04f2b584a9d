"""Pods that should be gone and whose nodes say nothing."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from control.observed import LABELS, NOW, Json, ago, child, children, deployment, job, of, pod
from dagger_operator.control import ATTEMPT, COMPONENT, FAILED, ROUND, ChildState


def going(name: str, due: str, phase: str = "Running") -> Json:
    one = pod(name, phase)
    return {**one, "metadata": {**one["metadata"], "deletionTimestamp": due}, "spec": {"nodeName": "gpu-7"}}


def test_a_pod_whose_node_does_not_say_that_it_ended_is_waited_for_and_named() -> None:
    overdue, due = going("a", ago(minutes=5)), NOW - timedelta(minutes=5)
    seen = child(job(active=0, terminating=1), [overdue])
    assert seen.trouble is not None
    assert (seen.state, seen.trouble.reason, seen.waiting_since, seen.pods) == (ChildState.WAITING, "NodeLost", due, 1)
    assert all(part in seen.trouble.message for part in ("pod a ", "node gpu-7 ", "delete node", "out-of-service", "--force"))
    training, *ranks = of("training", job(), overdue, pod("b"))
    gang = child(training, ranks)
    assert (gang.state, gang.waiting_since) == (ChildState.WAITING, due), "its peers wait for it"
    workers = child(job(), [overdue, pod("b")])
    assert (workers.state, workers.waiting_since) == (ChildState.RUNNING, None), "the others work"


def test_a_pod_that_ends_in_its_time_or_has_ended_is_no_lost_one() -> None:
    for one in (going("a", ago(seconds=5)), going("a", ago(seconds=-120)), going("a", ago(hours=1), "Failed")):
        trouble = child(job(), [one, pod("b")]).trouble
        assert trouble is None


def test_a_server_waits_for_a_lost_node_where_nothing_takes_its_place() -> None:
    manifest, overdue = of("student", deployment(), going("s", ago(minutes=5)))
    assert child(manifest, [overdue]).trouble is None, "its Deployment makes another pod at once"
    group = child(manifest | {"kind": "LeaderWorkerSet"}, [overdue])
    assert group.trouble is not None
    assert (group.state, group.trouble.reason) == (ChildState.WAITING, "NodeLost")


@pytest.mark.parametrize("kind", ["Deployment", "LeaderWorkerSet"])
def test_an_edited_server_waits_for_the_node_that_keeps_a_pod_of_the_earlier_attempt_and_says_since_when(kind: str) -> None:
    old = going("s-old", ago(minutes=5))
    old["metadata"]["labels"] = LABELS | {COMPONENT: "student", ATTEMPT: "00000000"}
    seen = child(deployment() | {"kind": kind}, [old])
    assert seen.trouble is not None
    assert (seen.state, seen.trouble.reason, seen.waiting_since) == (ChildState.WAITING, "NodeLost", NOW - timedelta(minutes=5))
    assert "node gpu-7" in seen.trouble.message
    old["metadata"]["deletionTimestamp"] = ago(seconds=5)
    assert child(deployment() | {"kind": kind}, [old]).trouble is None, "it ends in its time"


def test_a_lost_pod_is_known_also_of_what_waits_for_nothing_itself() -> None:
    server, overdue = of("student", deployment(wanted=0), going("s", ago(minutes=5)))
    given_up, _ = of("student", deployment(annotations={FAILED: "broken"}), overdue)
    deleting = job()
    deleting["metadata"] = {**deleting["metadata"], "deletionTimestamp": ago(minutes=6)}
    failed = job(conditions=[{"type": "Failed", "status": "True"}])
    at_rest = [child(server, [overdue]), child(given_up, [overdue])]
    at_rest += [child(one, [going("a", ago(minutes=5))]) for one in (job(spec={"suspend": True}), failed, deleting)]
    for one in at_rest:
        assert one.lost is not None
        assert (one.lost.reason, one.lost.since) == ("NodeLost", NOW - timedelta(minutes=5)), one
    assert child(server, [going("s", ago(seconds=5))]).lost is None, "it ends in its time"


def test_of_several_lost_pods_the_same_one_is_named_in_whatever_order_they_are_seen(story: Callable[..., Any]) -> None:
    tale = story()
    tale.into_rollouts()
    pods = [going(name, ago(minutes=5)) for name in ("a", "b")]
    for one in pods:
        one["metadata"]["labels"] = LABELS | {ROUND: "1"}
    lost = {(one.kind, one.name): one for one in children([], pods)}
    others = {key: one for key, one in tale.children.items() if one.kind != "Job"}
    said = []
    for seen in (lost, dict(reversed(lost.items()))):
        tale.children = others | seen
        said.append(tale.plan(told=False).status)
    assert said[0].reason == "NodeLost" and said[0] == said[1]
