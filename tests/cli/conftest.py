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
def ctl(tmp_path: Path) -> Ctl:
    """Runs the real command in an empty folder."""

    def call(*arguments: str, documents: list[Any] | None = None) -> "subprocess.CompletedProcess[str]":
        if documents is not None:
            (tmp_path / "run.yaml").write_text(yaml.safe_dump_all(documents))
        return subprocess.run(
            [sys.executable, "-m", "dagger_operator.cli", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return call
