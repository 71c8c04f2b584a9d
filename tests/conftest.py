"""Shared by the tests of all rooms: fixtures by subject, and streams of tests run in parallel (`pytest -n 2 --dist loadscope`)."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["fixtures.kubernetes", "fixtures.metrics", "fixtures.s3", "fixtures.sandboxes"]

# On a busy machine the duration of an example means nothing.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

TOGETHER = {
    "cluster": ("cluster/", "control/test_real_jobs.py", "e2e/on_cluster/", "images/", "rollout/test_in_pods.py", "sandbox/"),
    "control-plane": ("api/test_crd_on_api_server.py", "chart/", "control/test_admitted.py", "operator/"),
    "training/test_resuming.py": ("training/test_learning.py",),
}
"""By stream, where tests share what takes long to make: the cluster, the control plane, or the training that nothing disturbs."""
SHARED = {"cluster": "cluster", "control_plane": "control-plane"}
"""By fixture, the stream that alone may use it."""


def stream(nodeid: str) -> str:
    """Return the stream of a test: tests of one stream run one after the other, in one process."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, places in TOGETHER.items() if file.startswith(places)), file)


class Streams(LoadScopeScheduling):
    """Puts tests that share something into one stream; any free process takes the next file."""

    def _split_scope(self, nodeid: str) -> str:
        return stream(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Streams(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, alone in SHARED.items():
            if fixture in getattr(item, "fixturenames", ()) and stream(item.nodeid) != alone:
                raise pytest.UsageError(f"{item.nodeid} uses {fixture}: in tests/conftest.py its file has to be TOGETHER with '{alone}'")
    if hasattr(config, "workerinput"):  # in parallel
        items.sort(key=lambda item: _place(stream(item.nodeid)))


AT_LAST = {"training/test_resuming.py": 3, "training/": 1, "quickstart/": 2, "serving/": 4, "e2e/": 5}
"""By the first that fits, the place of tests that keep both cores busy, all after those that mostly wait: the cluster's tests, which take
longest, begin beside the latter, and go on beside trainings of one process."""


def _place(stream: str) -> int:
    if stream == "cluster":
        return -1
    return next((place for room, place in AT_LAST.items() if stream.startswith(room)), 0)


ENDS, LATEST = pytest.StashKey[ExitStack](), pytest.StashKey[str]()


@pytest.fixture(scope="session")
def until_stream_ends(request: pytest.FixtureRequest) -> Iterator[ExitStack]:
    """Ends what is entered here after the stream that uses it: idle, an API server still takes from the streams that follow.
    Where tests do not run in parallel, streams interleave, and the session ends it."""
    with ExitStack() as stack:
        request.config.stash[ENDS] = stack
        yield stack


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    stash, now = item.config.stash, stream(item.nodeid)
    if hasattr(item.config, "workerinput") and stash.get(LATEST, now) != now and ENDS in stash:
        stash[ENDS].close()
    stash[LATEST] = now
