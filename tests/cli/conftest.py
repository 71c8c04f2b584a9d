"""A home of its own, and runs to put there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """The smallest valid run."""
    return {
        "apiVersion": "dagger-operator.dev/v1alpha1",
        "kind": "DAggerRun",
        "metadata": {"name": "small"},
        "spec": {
            "student": {"model": "./student"},
            "teacher": {"model": "scripted", "endpoint": {"url": "http://127.0.0.1:9/v1"}},
            "tasks": {
                "source": {"type": "JSONL", "uri": "./tasks.jsonl"},
                "heldOut": {"source": {"type": "JSONL", "uri": "./tasks.jsonl", "split": "heldout"}},
            },
            "storage": {"url": "file://./store"},
        },
    }


@pytest.fixture
def from_kubectl(document: dict[str, Any]) -> dict[str, Any]:
    """The same run as `kubectl get daggerrun small -o yaml` writes it, with what an API server adds."""
    managed = [{"manager": "kubectl", "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {}}}]
    metadata = {"name": "small", "namespace": "lab", "uid": "6ffa", "generation": 2, "resourceVersion": "77", "managedFields": managed}
    status = {"phase": "Succeeded", "round": 2, "observedGeneration": 2, "rounds": [{"round": 1}, {"round": 2}]}
    return {**document, "metadata": metadata, "status": status}


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    """Runs the real command in an empty folder; `piped` comes in by standard input."""

    def call(*arguments: str, documents: list[Any] | None = None, piped: list[Any] | None = None) -> "subprocess.CompletedProcess[str]":
        if documents is not None:
            (tmp_path / "run.yaml").write_text(yaml.safe_dump_all(documents))
        return subprocess.run(
            [sys.executable, "-m", "dagger_operator.cli", *arguments],
            cwd=tmp_path,
            input=yaml.safe_dump_all(piped or []),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return call
