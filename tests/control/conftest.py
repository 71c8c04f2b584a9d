"""A run, and a small vocabulary to tell its story with."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dagger_operator.api import DAggerRun, load
from dagger_operator.control import COMPONENT, Child, ChildState, Observed, Plan, Results, child, plan
from dagger_operator.store.records import Record
from fixtures.results import result

Json = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)

SPEC: Json = {
    "rounds": 2,
    "student": {"model": "m", "serving": {"gpus": 1, "replicas": 2}},
    "teacher": {"model": "t", "endpoint": {"url": "https://teacher.example/v1", "secretRef": {"name": "teacher-key"}}},
    "tasks": {"source": {"type": "JSONL", "uri": "t"}, "heldOut": {"source": {"type": "JSONL", "uri": "h"}}},
    "rollouts": {"workers": 3},
    "storage": {"url": "s3://bucket/prefix", "secretRef": {"name": "storage-keys"}},
}


@pytest.fixture
def make_run() -> Callable[..., DAggerRun]:
    """A run with sections of its spec replaced, or changed where both are mappings."""

    def make(annotations: dict[str, str] | None = None, **sections: Any) -> DAggerRun:
        spec = copy.deepcopy(SPEC)
        for name, section in sections.items():
            spec[name] = section
        metadata = {"name": "demo", "namespace": "lab", "uid": "run-uid", "generation": 3, "annotations": annotations or {}}
        return load({"metadata": metadata, "spec": spec})

    return make


class Story:
    """What happens to one run: stages get done, children are seen in some state, time passes, plans are asked for."""

    def __init__(self, run: DAggerRun) -> None:
        self.run, self.now = run, START
        self.children: dict[tuple[str, str], Child] = {}
        self.results: dict[tuple[int, str], Record] = {}

    def done(self, *stages: str, round_number: int = 0) -> None:
        self.results |= {(round_number, stage): result(stage, round_number) for stage in stages}

    def plan(self, *, told: bool = True, storage_problem: str | None = None, **more: Any) -> Plan:
        observed = Observed(self.now, tuple(self.children.values()), Results(dict(self.results)), storage_problem, **more)
        planned = plan(self.run, observed)
        json.dumps(planned.objects)
        if told:
            self.run = self.run.model_copy(update={"status": planned.status})
        return planned

    def carry_out(self, planned: Plan) -> None:
        """All that was asked for exists, new things with pods; all that was to go is gone."""
        for manifest in planned.objects:
            fresh = child(manifest, (), self.now)
            known = self.children.get((fresh.kind, fresh.name))
            if fresh.state is not ChildState.SUSPENDED and known is not None and known.attempt == fresh.attempt:
                continue
            if fresh.state is not ChildState.SUSPENDED and fresh.kind in ("Job", "Deployment"):
                pods = manifest["spec"].get("completions") or manifest["spec"]["replicas"]
                fresh = replace(fresh, pods=pods, state=ChildState.RUNNING)
            self.children[fresh.kind, fresh.name] = fresh
        for ref in planned.remove:
            del self.children[ref.kind, ref.name]

    def see(self, component: str, **state: Any) -> Child:
        """The child of a component, from now on seen like this."""
        (key,) = [key for key, one in self.children.items() if one.component == component and one.kind not in ("Service", "NetworkPolicy")]
        self.children[key] = replace(self.children[key], **state)
        return self.children[key]

    def serve(self) -> None:
        for (kind, _), one in list(self.children.items()):
            if kind in ("Deployment", "LeaderWorkerSet"):
                self.see(one.component, state=ChildState.READY)

    def into_rollouts(self) -> None:
        """Round 1: servers are ready, workers run."""
        self.done("prepare", "preflight")
        self.carry_out(self.plan())
        self.serve()
        self.carry_out(self.plan())

    def later(self, **delta: float) -> None:
        self.now += timedelta(**delta)

    def edit(self, **sections: Any) -> None:
        document = {"metadata": self.run.metadata.wire(), "spec": self.run.spec.wire() | sections}
        self.run = load(document).model_copy(update={"status": self.run.status})

    def condition(self, kind: str) -> Any:
        assert self.run.status is not None
        return next((one for one in self.run.status.conditions if one.type == kind), None)


@pytest.fixture
def story(make_run: Callable[..., DAggerRun]) -> Callable[..., Story]:
    return lambda **sections: Story(make_run(**sections))


@pytest.fixture
def wanted() -> Callable[[Plan], dict[tuple[str, str], Json]]:
    """The objects of a plan by kind and component."""
    return lambda planned: {(one["kind"], one["metadata"]["labels"][COMPONENT]): one for one in planned.objects}
