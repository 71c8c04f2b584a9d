"""Hand-made objects that wear our labels."""

from typing import Any

import pytest

from dagger_operator.api import DAggerRun, load
from dagger_operator.cluster.ownership import own

Json = dict[str, Any]


@pytest.fixture
def run() -> DAggerRun:
    spec = {
        "student": {"model": "m"},
        "teacher": {"model": "t", "endpoint": {"url": "https://t/v1"}},
        "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
        "storage": {"url": "s3://bucket/prefix"},
    }
    return load({"metadata": {"name": "demo", "namespace": "lab", "uid": "run"}, "spec": spec})


def made(kind: str, name: str, owner: tuple[str, str, str] | None, namespace: str = "lab", **labels: str) -> Json:
    """An object with its controller: kind, name, uid."""
    metadata: Json = {"name": name, "namespace": namespace, "uid": f"uid-of-{name}"}
    metadata["labels"] = {f"dagger-operator.dev/{label}": text for label, text in labels.items()}
    if owner is not None:
        metadata["ownerReferences"] = [{"kind": owner[0], "name": owner[1], "uid": owner[2], "controller": True}]
    return {"kind": kind, "metadata": metadata}


ROLLOUT = {"component": "rollout", "round": "1"}
RUN = ("DAggerRun", "demo", "run")
JOB = made("Job", "demo-r001-rollout-x", RUN)
SERVER = made("Deployment", "demo-student", RUN)
FOREIGN_JOB = made("Job", "demo-by-hand", None)
FOREIGN_SERVER = made("Deployment", "demo-other", None)
EARLIER = made("Job", "demo-r001-rollout-x", ("DAggerRun", "demo", "an earlier run of that name"))

CASES: list[tuple[str, Json, bool]] = [
    ("its own Job", JOB, True),
    ("an earlier run's Job", EARLIER, False),
    ("a Job made by hand", FOREIGN_JOB, False),
    ("an object in another namespace", made("Job", "demo-r001-rollout-y", RUN, "elsewhere"), False),
    ("a pod of its Job", made("Pod", "p", ("Job", "demo-r001-rollout-x", "uid-of-demo-r001-rollout-x")), True),
    ("a pod whose Job is gone", made("Pod", "p", ("Job", "demo-r001-rollout-old", "gone"), **ROLLOUT, attempt="old"), True),
    ("a pod of a Job by hand that is unknown", made("Pod", "p", ("Job", "demo-by-hand-too", "x"), **ROLLOUT, attempt="old"), False),
    ("a pod of an unknown Job, without labels", made("Pod", "p", ("Job", "demo-r001-rollout-old", "gone")), False),
    ("a pod whose round is no number", made("Pod", "p", ("Job", "demo-r001-rollout-old", "gone"), **{**ROLLOUT, "round": "x"}), False),
    ("a pod of its group of nodes", made("Pod", "p", ("StatefulSet", "demo-teacher-group", "s")), True),
    ("a pod of a further node", made("Pod", "p", ("StatefulSet", "demo-teacher-group-0", "s")), True),
    ("a pod of a StatefulSet made by hand", made("Pod", "p", ("StatefulSet", "demo-data", "s")), False),
    ("a pod of an unknown ReplicaSet", made("Pod", "p", ("ReplicaSet", "demo-web-5d4f", "rs")), False),
    ("a pod of another kind of controller", made("Pod", "p", ("DaemonSet", "demo-student", "d")), False),
    ("a pod of its Deployment", made("Pod", "p", ("ReplicaSet", "demo-student-5d4f", "rs")), True),
    ("a pod whose Deployment is gone", made("Pod", "p", ("ReplicaSet", "demo-teacher-5d4f", "rs")), True),
    ("a pod made by hand", made("Pod", "p", None), False),
    ("a pod of a Job made by hand", made("Pod", "p", ("Job", "demo-by-hand", "uid-of-demo-by-hand")), False),
    ("a pod of a Deployment made by hand", made("Pod", "p", ("ReplicaSet", "demo-other-5d4f", "rs")), False),
    ("a pod of somebody else's ReplicaSet", made("Pod", "p", ("ReplicaSet", "web-5d4f", "rs")), False),
]


@pytest.mark.parametrize(("what", "manifest", "expected"), CASES, ids=[case[0] for case in CASES])
def test_a_label_alone_makes_nothing_a_runs_own(run: DAggerRun, what: str, manifest: Json, expected: bool) -> None:
    around = [SERVER, FOREIGN_JOB, FOREIGN_SERVER] + ([JOB] if manifest is not EARLIER else [])
    objects, pods = own(run, [one for one in around if one is not manifest] + [manifest])
    assert (manifest in objects or manifest in pods) is expected
