"""What does not depend on how fast a machine is: what many runs cost the API server. How fast it is, benchmarks/scale.py measures."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

FEW, MANY = 3, 9
KINDS = "deployments,jobs,services,serviceaccounts,networkpolicies,rolebindings"


async def test_each_child_is_written_once_and_a_fleet_at_rest_is_not_written_to_nor_by_a_new_operator(
    lab: Any, make_operator: Callable[..., Any], control_plane: Any
) -> None:
    settings = {"lease": "-", "sandbox_namespace": lab.namespace}
    operator = make_operator(**settings)
    operator.start()
    lab.paused = {"rollout"}

    def applied() -> tuple[int, int]:
        """Server-side applies that were taken so far: of children, and of runs' status. Only this test's operator makes them now."""
        found = re.findall(r'^apiserver_request_total\{(.*verb="APPLY".*)\} (\d+)', control_plane.kubectl("get", "--raw", "/metrics"), re.M)
        taken = [
            (labels, int(count)) for labels, count in found if 'code="2' in labels and 'resource="customresourcedefinitions"' not in labels
        ]
        status = sum(count for labels, count in taken if 'subresource="status"' in labels)
        return sum(count for _, count in taken) - status, status

    def children() -> int:
        ours = "--selector=app.kubernetes.io/managed-by=dagger-operator"
        return len(control_plane.kubectl("get", KINDS, f"--namespace={lab.namespace}", ours, "--output=name").split())

    async def at_rest(first: int, last: int) -> None:
        """Makes runs, and returns once all are in their rollouts and nothing was written for a while."""
        await asyncio.gather(*(lab.create(f"run-{number}", rollouts={"workers": 2}) for number in range(first, last)))
        for number in range(first, last):
            await lab.until_job("rollout", f"run-{number}")
        seen = -1.0
        while seen != (seen := writes(operator)):
            await asyncio.sleep(3)

    begun = applied()
    await at_rest(0, FEW)
    few, few_children = applied(), children()
    await at_rest(FEW, MANY)
    many, many_children = applied(), children()
    assert few[0] - begun[0] == few_children
    assert many[0] - few[0] == many_children - few_children, "each child is applied once, however many there are"
    per_run = (few[1] - begun[1]) / FEW, (many[1] - few[1]) / (MANY - FEW)
    assert per_run[1] <= per_run[0] + 2, "a status is not written more often because there are more runs"

    before, seen = writes(operator), looks(operator)
    await lab.until(lambda: _true(looks(operator) >= seen + MANY))
    assert writes(operator) == before, "nothing changes, nothing is written"

    operator.kill()
    operator = make_operator(**settings)
    operator.start()
    await lab.until(lambda: _true(looks(operator) >= 2 * MANY))
    assert writes(operator) == 0, "what is as it should be was found so"
    assert applied() == many
    # Another test's operator, which sees all namespaces, would have them to look at.
    control_plane.kubectl("delete", "daggerruns", "--all", f"--namespace={lab.namespace}")


async def _true(found: bool) -> bool:
    return found


def looks(operator: Any) -> float:
    return _sum(operator.metrics(), r"dagger_operator_reconcile_seconds_count")


def writes(operator: Any) -> float:
    return _sum(operator.metrics(), r'rest_client_requests_total\{.*method="(?:PATCH|POST|PUT|DELETE)"')


def _sum(exposition: str, pattern: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in exposition.splitlines() if re.match(pattern, line))
