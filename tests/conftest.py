"""Fixtures that every room's tests may use."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from dagger_operator.api import Storage
from dagger_operator.store.objects import Store

# How long an example takes says nothing on a busy machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class S3:
    """A bucket of its own on a real S3 server, and what a client's environment has to hold."""

    storage: Storage
    environ: dict[str, str]

    @property
    def url(self) -> str:
        return self.storage.url

    def open(self) -> Store:
        return Store.open(self.storage, self.environ)


@pytest.fixture(scope="session")
def versitygw() -> Iterator[tuple[str, Path]]:
    """A running S3 server: its endpoint, and the folder whose subfolders are its buckets."""
    build = subprocess.run([sys.executable, ROOT / "scripts" / "build-tool", "versitygw"], stdout=subprocess.PIPE, text=True, check=True)
    program = Path(build.stdout.strip())
    root = _folder_with_attributes(Path(tempfile.gettempdir()), program.parent)
    (root / "buckets").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", f"127.0.0.1:{port}", "--quiet", "posix", root / "buckets"]
    environ = {
        "PATH": os.environ["PATH"],
        "ROOT_ACCESS_KEY_ID": _KEYS["AWS_ACCESS_KEY_ID"],
        "ROOT_SECRET_ACCESS_KEY": _KEYS["AWS_SECRET_ACCESS_KEY"],
    }
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ)
    try:
        _wait_for(port, server, root / "log")
        yield f"http://127.0.0.1:{port}", root / "buckets"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def s3(versitygw: tuple[str, Path]) -> S3:
    """A fresh bucket with a prefix in it."""
    endpoint, buckets = versitygw
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    (buckets / bucket).mkdir()
    return S3(Storage(url=f"s3://{bucket}/runs/one", endpoint_url=endpoint, region="us-east-1"), dict(_KEYS))


_KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "for-tests-on-loopback-only"}


def _folder_with_attributes(*parents: Path) -> Path:
    """The server keeps ETags in extended attributes. (Its `--sidecar` does without, and then loses updates: `store.check` shows it.)"""
    for parent in parents:
        folder = Path(tempfile.mkdtemp(prefix="dagger-s3-", dir=parent))
        try:
            os.setxattr(folder, "user.dagger", b"1")
            return folder
        except OSError:
            folder.rmdir()
    raise RuntimeError(
        f"no file system with extended attributes below any of {', '.join(map(str, parents))}: set TMPDIR to a folder on one"
    )


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"versitygw ended with {server.returncode}: {log.read_text()[-2000:]}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"versitygw did not listen within 60 s: {log.read_text()[-2000:]}")
