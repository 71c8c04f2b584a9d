"""What this machine stores of a run: the resource with its status, its Secrets, the logs. Data is in object storage."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from dagger_operator.api import DAggerRun, load


class InUse(Exception):
    """Another process on this machine is working on the same thing."""


class UnknownRun(Exception):
    """There is no run of that name in this folder."""


def home(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder of all runs: `$DAGGER_HOME`, or `.dagger` below the current folder."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("DAGGER_HOME", ".dagger")).absolute()


class RunFolder:
    """`runs/<name>/` below the home."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.path = root / "runs" / name
        self.logs = self.path / "logs"

    @classmethod
    def all(cls, root: Path) -> list["RunFolder"]:
        """Return every stored run, sorted by name."""
        return [cls(root, path.parent.name) for path in sorted((root / "runs").glob("*/run.json"))]

    def load(self) -> DAggerRun | None:
        """Return the resource as last written; None if there is none."""
        try:
            return load(json.loads((self.path / "run.json").read_text()))
        except FileNotFoundError:
            return None

    def require(self) -> DAggerRun:
        """Return the resource; raises `UnknownRun`, which lists the existing runs."""
        run = self.load()
        if run is None:
            names = ", ".join(folder.name for folder in self.all(self.path.parents[1])) or "none"
            raise UnknownRun(f"no run {self.name!r} in {self.path.parents[1]}; runs there: {names}. DAGGER_HOME names another folder")
        return run

    def save(self, run: DAggerRun) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._write("run.json", json.dumps(run.wire(), indent=1))

    def secrets(self) -> dict[str, dict[str, str]]:
        """Return the Secrets by name, each by key."""
        try:
            found: dict[str, dict[str, str]] = json.loads((self.path / "secrets.json").read_text())
            return found
        except FileNotFoundError:
            return {}

    def save_secrets(self, secrets: Mapping[str, Mapping[str, str]]) -> None:
        """Save Secrets, readable for this user only."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write("secrets.json", json.dumps(secrets))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the one process that works on the run; raises `InUse` immediately if it is taken."""
        with locked(self.path / "lock", f"run {self.name!r} is being worked on", f"`daggerctl status {self.name}` shows it"):
            yield

    def _write(self, name: str, text: str) -> None:
        """Write a file atomically, and readable for this user only, as `mkstemp` creates it."""
        handle, partial = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(partial).replace(self.path / name)


@contextlib.contextmanager
def locked(path: Path, doing: str, remedy: str) -> Iterator[None]:
    """Hold a lock for one process at a time, whose id is in the file; raises `InUse` immediately if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InUse(f"{doing} by process {lock.read().strip() or '?'}; {remedy}") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
