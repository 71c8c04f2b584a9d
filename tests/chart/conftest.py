"""The chart, rendered by the real Helm."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "dagger-operator"
Json = dict[str, Any]
Helm = Callable[..., "subprocess.CompletedProcess[str]"]
Render = Callable[..., list[Json]]


class Refused(Exception):
    """Helm ended with an error; the message is Helm's."""


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Runs Helm, built once for this machine. Raises `Refused`."""
    build = subprocess.run([sys.executable, ROOT / "scripts" / "build-tool", "helm"], stdout=subprocess.PIPE, text=True, check=True)
    program = build.stdout.strip()

    def call(*arguments: str | Path, input: str | None = None) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run([program, *arguments], input=input, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise Refused(done.stderr)
        return done

    return call


@pytest.fixture(scope="session")
def render(helm: Helm) -> Render:
    """The chart's objects for some values, the pod of `helm test` included; `apis`: what the cluster serves beside Kubernetes' own."""

    def call(values: Mapping[str, Any] | None = None, *, apis: tuple[str, ...] = ()) -> list[Json]:
        arguments = ["template", "dagger-operator", CHART, "--namespace", "dagger-system", "--kube-version", "1.34", "--values", "-"]
        for api in apis:
            arguments += ["--api-versions", api]
        return [one for one in yaml.safe_load_all(helm(*arguments, input=json.dumps(values or {})).stdout) if one]

    return call


def of_kind(objects: list[Json], *kinds: str) -> list[Json]:
    return [one for one in objects if one["kind"] in kinds]


@pytest.fixture(scope="session")
def pods() -> Callable[[list[Json]], Iterator[Json]]:
    """The specs of all pods that the objects make."""

    def call(objects: list[Json]) -> Iterator[Json]:
        for one in of_kind(objects, "Deployment"):
            yield one["spec"]["template"]["spec"]
        for one in of_kind(objects, "Pod"):
            yield one["spec"]

    return call
