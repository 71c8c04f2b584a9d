"""Shared by the tests of all rooms: fixtures by subject, and streams of tests run in parallel (`pytest -n 2 --dist loadscope`)."""

from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["fixtures.kubernetes", "fixtures.metrics", "fixtures.s3", "fixtures.sandboxes"]

# On a busy machine the duration of an example means nothing.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ON_THE_CLUSTER = ("cluster/", "control/test_real_jobs.py", "e2e/on_cluster/", "images/", "rollout/test_in_pods.py", "sandbox/")
"""Where tests share the one cluster: they run one after the other, in one stream."""


def stream(nodeid: str) -> str:
    """Return the stream of a test: tests of one stream run one after the other, in one process."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return "cluster" if file.startswith(ON_THE_CLUSTER) else file


class Streams(LoadScopeScheduling):
    """Puts the tests that share the cluster into one stream; any free process takes the next file."""

    def _split_scope(self, nodeid: str) -> str:
        return stream(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Streams(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and stream(item.nodeid) != "cluster":
            raise pytest.UsageError(f"{item.nodeid} uses the cluster: its file has to be among ON_THE_CLUSTER in tests/conftest.py")
    if hasattr(config, "workerinput"):  # in parallel
        items.sort(key=lambda item: _place(stream(item.nodeid)))


AT_LAST = ("quickstart/", "training/", "serving/", "e2e/")
"""Tests that keep both cores busy, in this order: during the cluster stream's whole run, the other process mostly waits."""


def _place(stream: str) -> int:
    if stream == "cluster":
        return -1
    return next((place for place, room in enumerate(AT_LAST, 1) if stream.startswith(room)), 0)
