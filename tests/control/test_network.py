"""Who may reach a run's servers and trainings, and since when."""

from collections.abc import Callable
from typing import Any

import pytest

from dagger_operator.control import PROMETHEUS, ChildState, Plan

Wanted = Callable[[Plan], dict[tuple[str, str], Any]]
Story = Any


def test_servers_are_open_to_the_runs_own_pods_and_to_those_who_may_scrape_here(story: Callable[..., Story], wanted: Wanted) -> None:
    tale = story()
    tale.done("prepare")

    def admitted(**more: Any) -> list[Any]:
        (rule,) = wanted(tale.plan(told=False, **more))["NetworkPolicy", "serving"]["spec"]["ingress"]
        assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}]
        return list(rule["from"])

    own, *others = admitted()
    assert own["podSelector"]["matchLabels"]["dagger-operator.dev/run"] == "demo"
    assert others == [*PROMETHEUS]
    agent = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "vmagent"}}}
    assert admitted(scrapers=(agent,)) == [own, agent]
    assert admitted(scrapers=()) == [own]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_trainings_ranks_are_open_to_each_other_alone_until_the_last_has_ended(
    story: Callable[..., Story], wanted: Wanted, nodes: int
) -> None:
    tale = story(training={"nodes": nodes})
    tale.into_rollouts()
    assert ("NetworkPolicy", "training") not in wanted(tale.plan())
    tale.done("rollout", round_number=1)
    planned = tale.plan()
    order = [(one["kind"], one["metadata"]["name"]) for one in planned.objects]
    job = wanted(planned)["Job", "training"]
    assert order.index(("NetworkPolicy", "demo-training")) < order.index(("Job", job["metadata"]["name"])), "before anybody listens"
    policy = wanted(planned)["NetworkPolicy", "training"]["spec"]
    labels = {"dagger-operator.dev/run": "demo", "dagger-operator.dev/component": "training"}
    ranks = {"matchLabels": {"app.kubernetes.io/managed-by": "dagger-operator", **labels}}
    assert ranks["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    metrics = {"from": [*PROMETHEUS], "ports": [{"port": 9090, "protocol": "TCP"}]}
    assert policy == {"podSelector": ranks, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": ranks}]}, metrics]}
    unscraped = wanted(tale.plan(told=False, scrapers=()))["NetworkPolicy", "training"]["spec"]
    assert unscraped["ingress"] == [{"from": [{"podSelector": ranks}]}], "a rule without peers would admit everybody"
    tale.carry_out(planned)
    tale.done("training", round_number=1)
    tale.see("training", state=ChildState.RUNNING, pods=1)
    assert ("NetworkPolicy", "training") in wanted(tale.plan()), "the result is there, and a rank has yet to end"
    tale.see("training", state=ChildState.SUCCEEDED, pods=0)
    assert ("NetworkPolicy", "demo-training") in {(ref.kind, ref.name) for ref in tale.plan().remove}
