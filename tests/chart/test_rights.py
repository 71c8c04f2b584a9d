"""The operator's ServiceAccount on a real API server: enough rights, and none beyond them."""

import json
import time
from typing import Any

import pytest

pytestmark = pytest.mark.heavy

Json = dict[str, Any]
ALL = ("get", "list", "watch", "create", "patch", "delete")
RUNS, SANDBOXES, OWN, ELSEWHERE = "runs", "sandboxes", "system", "elsewhere"
"""Namespaces: of runs, of sandboxes, the operator's own, any other."""

NEEDED: list[tuple[str, str, str, tuple[str, ...]]] = [
    (RUNS, "dagger-operator.dev", "daggerruns", ("get", "list", "watch", "delete")),
    (RUNS, "dagger-operator.dev", "daggerruns/status", ("patch",)),
    (RUNS, "dagger-operator.dev", "daggerruns/finalizers", ("update",)),
    (RUNS, "apps", "deployments", ALL),
    (RUNS, "batch", "jobs", ALL),
    (RUNS, "", "services", ALL),
    (RUNS, "", "serviceaccounts", ALL),
    (RUNS, "networking.k8s.io", "networkpolicies", ALL),
    (RUNS, "leaderworkerset.x-k8s.io", "leaderworkersets", ALL),
    (RUNS, "", "pods", ("get", "list", "watch")),
    (RUNS, "", "events", ("get", "list", "create", "patch")),
    (RUNS, "", "secrets", ("get",)),
    (SANDBOXES, "rbac.authorization.k8s.io", "rolebindings", ("get", "list", "create", "patch", "delete")),
    (SANDBOXES, "rbac.authorization.k8s.io", "roles dagger-sandbox-worker", ("bind",)),
    (SANDBOXES, "coordination.k8s.io", "leases", ("list", "delete")),
    (OWN, "coordination.k8s.io", "leases", ("create",)),
    (OWN, "coordination.k8s.io", "leases dagger-operator", ("get", "update")),
]
WITHHELD: list[tuple[str, str, str, tuple[str, ...]]] = [
    (RUNS, "dagger-operator.dev", "daggerruns", ("create", "update", "patch", "deletecollection")),
    (RUNS, "", "secrets", ("list", "watch", "create", "update", "patch", "delete")),
    (RUNS, "", "pods", ("create", "update", "patch", "delete")),
    (RUNS, "", "pods/exec", ("create", "get")),
    (RUNS, "", "pods/log", ("get",)),
    (RUNS, "", "serviceaccounts/token", ("create",)),
    (RUNS, "rbac.authorization.k8s.io", "rolebindings", ALL),
    (RUNS, "", "configmaps", ALL),
    (SANDBOXES, "", "pods", (*ALL, "update")),
    (SANDBOXES, "coordination.k8s.io", "leases", ("get", "watch", "create", "update", "patch")),
    (SANDBOXES, "rbac.authorization.k8s.io", "rolebindings", ("watch", "update", "deletecollection")),
    (SANDBOXES, "", "pods/exec", ("create", "get")),
    (SANDBOXES, "", "secrets", ("get", "list")),
    (SANDBOXES, "rbac.authorization.k8s.io", "roles", ("create", "update", "patch", "escalate", "bind")),
    (OWN, "", "secrets", ("get", "list")),
    (OWN, "coordination.k8s.io", "leases another", ("get", "update", "patch", "delete")),
    (ELSEWHERE, "dagger-operator.dev", "daggerruns", ("get", "list", "watch")),
    (ELSEWHERE, "batch", "jobs", ALL),
    (ELSEWHERE, "", "secrets", ("get",)),
    ("", "", "nodes", ("get", "list")),
    ("", "", "namespaces", ("list", "create", "delete")),
    ("", "apiextensions.k8s.io", "customresourcedefinitions", ("get", "create", "patch", "delete")),
    ("", "rbac.authorization.k8s.io", "clusterroles", ("create", "bind", "escalate")),
]


def answers(release: Any, user: str, asked: list[tuple[str, str, str, tuple[str, ...]]]) -> dict[str, bool]:
    """What the API server's authorizer says to each (namespace, group, resource [name], verbs)."""
    places = {RUNS: release.runs, SANDBOXES: release.sandboxes, OWN: release.system, ELSEWHERE: "default", "": ""}
    reviews: dict[str, Json] = {}
    for place, group, what, verbs in asked:
        (resource, _, subresource), name = what.split(" ")[0].partition("/"), "".join(what.split(" ")[1:])
        for verb in verbs:
            attributes = {"namespace": places[place], "group": group, "resource": resource, "subresource": subresource, "name": name}
            spec = {"user": user, "groups": ["system:authenticated"], "resourceAttributes": {**attributes, "verb": verb}}
            reviews[f"{verb} {group}/{what} in {place}"] = spec
    items = [{"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec} for spec in reviews.values()]
    printed = ["-o", r'jsonpath={.status.allowed}{"\n"}']
    done = release.kubectl("create", "-f", "-", *printed, input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return dict(zip(reviews, (line == "true" for line in done.stdout.splitlines()), strict=True))


def test_the_operator_may_do_all_that_it_does(release: Any) -> None:
    assert [asked for asked, allowed in answers(release, release.operator, NEEDED).items() if not allowed] == []


def test_the_operator_may_do_nothing_else(release: Any) -> None:
    assert [asked for asked, allowed in answers(release, release.operator, WITHHELD).items() if allowed] == []


def binding(release: Any, role: str, kind: str = "Role") -> Json:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": f"{release.runs}.mine.worker", "namespace": release.sandboxes},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": "mine-worker", "namespace": release.runs}],
    }


def test_the_operator_binds_the_workers_role_and_no_other(release: Any) -> None:
    refused = release.create(binding(release, "edit", "ClusterRole"), user=release.operator)
    assert refused.returncode and "attempting to grant RBAC permissions not currently held" in refused.stderr
    bound = release.create(binding(release, "dagger-sandbox-worker"), user=release.operator, keep=True)
    assert bound.returncode == 0, bound.stderr
    worker = f"system:serviceaccount:{release.runs}:mine-worker"
    may = [
        (SANDBOXES, "", "pods", ("get", "list", "watch", "create", "delete")),
        (SANDBOXES, "", "pods/exec", ("create",)),
        (SANDBOXES, "coordination.k8s.io", "leases", ("get", "list", "create", "update", "delete")),
    ]
    may_not = [
        (SANDBOXES, "", "pods", ("update", "patch", "deletecollection")),
        (SANDBOXES, "", "secrets", ("get", "list")),
        (SANDBOXES, "", "pods/ephemeralcontainers", ("update", "patch")),
        (SANDBOXES, "rbac.authorization.k8s.io", "rolebindings", ALL),
        (RUNS, "", "pods", ALL),
        (RUNS, "", "secrets", ("get", "list")),
    ]
    assert all(answers(release, worker, may).values())
    assert not any(answers(release, worker, may_not).values())


def test_editors_of_a_namespace_may_make_runs_and_viewers_may_see_them(release: Any) -> None:
    for role in "view", "edit":
        bind = ["create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", f"--namespace={release.runs}"]
        assert release.kubectl(*bind).returncode == 0
    see, make = ((RUNS, "dagger-operator.dev", "daggerruns", (verb,)) for verb in ("get", "create"))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(answers(release, "editer", [see, make]).values()):
        time.sleep(0.5)  # a controller puts the aggregated rules in
    assert list(answers(release, "editer", [see, make]).values()) == [True, True]
    assert list(answers(release, "viewer", [see, make]).values()) == [True, False]
