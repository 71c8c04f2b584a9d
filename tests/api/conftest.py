"""The smallest run, and one with every section given."""

import copy
from typing import Any

import pytest

MINIMAL: dict[str, Any] = {
    "apiVersion": "dagger-operator.dev/v1alpha1",
    "kind": "DAggerRun",
    "metadata": {"name": "run"},
    "spec": {
        "student": {"model": "Qwen/Qwen3-4B-Instruct-2507"},
        "teacher": {"model": "teacher", "endpoint": {"url": "https://teacher.example/v1"}},
        "tasks": {"source": {"type": "JSONL", "uri": "tasks.jsonl"}, "heldOut": {"source": {"type": "JSONL", "uri": "held-out.jsonl"}}},
        "storage": {"url": "s3://bucket/run"},
    },
}


@pytest.fixture
def document() -> dict[str, Any]:
    """A copy of the smallest run, to be changed."""
    return copy.deepcopy(MINIMAL)
