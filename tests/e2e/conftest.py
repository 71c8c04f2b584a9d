"""Whole runs by the real command: the quickstart's tasks and its scripted policies behind a real endpoint."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.scripted import scripted_policies
from fixtures.tools import ROOT

QUICKSTART = ROOT / "examples/quickstart"


class Runs:
    """A folder in which runs are made, and `daggerctl` in it."""

    def __init__(self, folder: Path, teacher: str) -> None:
        self.folder, self.teacher = folder, teacher

    def inside(self, name: str) -> "Runs":
        """The same tasks in a folder and home of its own, where a run of the same name is another run."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "tasks.jsonl").symlink_to(self.folder / "tasks.jsonl")
        return Runs(folder, self.teacher)

    def document(self, name: str, **spec: Any) -> Path:
        """A file with the quickstart's run under another name, its sections replaced or extended by `spec`."""
        document = yaml.safe_load((QUICKSTART / "dagger-run.yaml").read_text())
        document["metadata"]["name"] = name
        own = document["spec"]
        own["teacher"]["endpoint"]["url"] = self.teacher
        source = {"type": "JSONL", "uri": str(self.folder / "tasks.jsonl")}
        own["tasks"]["source"] = {**source, "split": "train"}
        own["tasks"]["heldOut"] = {"source": {**source, "split": "heldout"}}
        own["storage"] = {"url": f"file://{self.folder}/storage/{name}"}
        for section, value in spec.items():
            own[section] = {**own.get(section, {}), **value} if isinstance(value, dict) else value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "dagger_operator.cli", *arguments]
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ctl(self, *arguments: str, timeout: float = 900) -> str:
        """Output of a command that must succeed."""
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == 0, output
        return output

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ctl("status", name, "-o", "json"))["status"]
        return found


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of the quickstart's scripted policies: `teacher` and `scripted-student`."""
    with scripted_policies("127.0.0.1") as url:
        yield url


@pytest.fixture
def runs(tmp_path: Path, scripted: str) -> Iterator[Runs]:
    make = [sys.executable, str(QUICKSTART / "tasks.py"), "--seed", "7", "--train", "40", "--held-out", "12"]
    subprocess.run([*make, "--out", str(tmp_path / "tasks.jsonl")], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "operator")})
    yield Runs(tmp_path, scripted)
    from dagger_operator.local.processes import Reach, reap

    for path in tmp_path.glob("**/.dagger/runs/*/run.json"):
        reap(Reach(json.loads(path.read_text())["metadata"]["uid"] + "/", path.parent / "logs"))
