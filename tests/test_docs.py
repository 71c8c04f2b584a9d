"""What the documents say is so: their links lead somewhere, their commands work, their tables are those of the manifests."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "images/*.md", "benchmarks/*.md", "tests/cluster/*.md") for path in ROOT.glob(pattern)
)

SAMPLES = sorted((ROOT / "manifests" / "samples").rglob("*.yaml"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub("`[^`\n]*`", "", page.read_text())  # in code nothing is a link
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(path: Path) -> list[str]:
    """Shell commands of a page or of a manifest's comment, each on one line."""
    text = re.sub(r"^#( {2,3})", r" \1", path.read_text(), flags=re.M)
    return [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]


INSTALLED = ("image.repository", "image.tag", "sandbox.helperImage", "runs.workerImage", "runs.trainerImage")


@pytest.mark.parametrize("path", [*PAGES, *SAMPLES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_helm_command_forgets_the_images_that_an_earlier_one_named_or_names_them_for_one_version_only(path: Path) -> None:
    for command in commands(path):
        if command.startswith("helm upgrade"):
            given = set(re.findall(r"--set(?:-string)? ([\w.]+)=", command))
            assert "--reset-then-reuse-values" in command or given >= set(INSTALLED), command


@pytest.mark.parametrize("path", [*PAGES, *SAMPLES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_helm_command_takes_a_version_of_digits_alone_for_text(path: Path) -> None:
    for command in commands(path):
        assert not re.search(r"--set \S*\.tag=", command), f"write --set-string: {command}"


BUILDING = [*PAGES, *SAMPLES, ROOT / "Makefile", ROOT / "images" / "Dockerfile", ROOT / "scripts" / "images"]


@pytest.mark.parametrize("path", BUILDING, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_image_that_is_built_with_docker_says_of_which_commit_it_is(path: Path) -> None:
    for command in commands(path):
        if re.search(r"(docker|\$\(DOCKER\)) build\b", command):
            assert "--build-arg REVISION=" in command, command


def test_make_builds_with_docker_and_names_the_commit() -> None:
    done = subprocess.run(["make", "--dry-run", "--old-file=setup", "images", "DOCKER=docker"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"--build-arg REVISION=([0-9a-f]{40}(-modified)?|unknown) ", done.stdout), done.stdout + done.stderr


def test_every_image_of_the_quickstart_is_taken_from_the_registry_that_its_command_names(tmp_path: Path) -> None:
    folder = ROOT / "manifests" / "samples" / "quickstart"
    (script,) = re.findall(r"^#   (for file in .*?^#   done)$", (folder / "inputs.yaml").read_text(), re.M | re.S)
    script = script.replace("\n#   ", "\n").replace("manifests/", f"{ROOT}/manifests/")
    environment = {**os.environ, "REGISTRY": "registry.example.com/dagger", "VERSION": "9.9.9"}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, check=True)
    for file in ("inputs.yaml", "run.yaml"):
        before, after = (re.findall(r"^[^#]*image: (\S+)", (place / file).read_text(), re.M) for place in (folder, tmp_path))
        assert before
        assert after == [re.sub("^dagger-operator/(.*):.*$", r"registry.example.com/dagger/\1:9.9.9", image) for image in before]
        assert all(image.startswith("registry.example.com/") for image in after)
