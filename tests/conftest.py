"""What all rooms' tests share: fixtures by what they are of, and two streams of tests at a time."""

import pytest
from hypothesis import settings

pytest_plugins = ["fixtures.kubernetes", "fixtures.metrics", "fixtures.s3", "fixtures.sandboxes"]

# How long an example takes says nothing on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: what shares the cluster in one stream, every other file in the stream that is free, the longest first."""
    if config.getoption("dist", "no") != "loadgroup":
        return
    group = {item: "cluster" if "cluster" in getattr(item, "fixturenames", ()) else str(item.path) for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group[item]))
    items.sort(key=lambda item: (group[item] != "cluster", group[item] != "cluster" and item.path.name != "test_quickstart.py"))
