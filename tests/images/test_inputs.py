"""What images are made of: the same versions everywhere, and nothing that a build would not notice."""

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("images_script", str(ROOT / "scripts" / "images"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("lock", ["control", "worker", "trainer", "serve-cpu"])
def test_an_image_is_tested_with_the_versions_that_it_holds(lock: str) -> None:
    own, tested = _versions(lock), _versions("all")
    assert own and {name: tested.get(name) for name in own if name in tested} == {n: v for n, v in own.items() if n in tested}
    assert own.keys() - tested.keys() <= {"colorama"}, "only what is for other systems is in no test"


def test_a_change_of_any_input_makes_other_images(script: Any) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert sorted(script.CONTEXT) == sorted(line[1:] for line in ignored if line.startswith("!"))


def test_dockerfile_script_and_make_know_the_same_targets(script: Any) -> None:
    stages = re.findall(r"^FROM .* AS (\S+)$", (ROOT / "images" / "Dockerfile").read_text(), re.MULTILINE)
    assert set(script.TARGETS) <= set(stages)
    (made,) = re.findall(r"for target in (.*); do", (ROOT / "Makefile").read_text())
    assert made.split() == script.TARGETS


def test_the_trainer_finds_a_driver_where_gke_mounts_it() -> None:
    """Docker and buildah read the same file; PATH and HOME, by which images are tested, come the same way."""
    stages = re.split(r"^FROM ", (ROOT / "images" / "Dockerfile").read_text(), flags=re.MULTILINE)
    (trainer,) = [stage for stage in stages if re.match(r"\S+ AS trainer\n", stage)]
    assert re.findall(r"^ENV LD_LIBRARY_PATH=(.*)$", trainer, re.MULTILINE) == ["/usr/local/nvidia/lib64"]


def _versions(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "locks" / f"{lock}.txt").read_text(), re.MULTILINE))
