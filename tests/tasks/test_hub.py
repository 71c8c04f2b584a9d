"""A data set of a Hugging Face hub by the hub's own client: at the commit that is named, and its commit where none is."""

import io
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

OLD, NEW = "1" * 40, "2" * 40
DATA = "data/train-00000-of-00001.parquet"
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"
SCRIPT = f"""
    from dagger_operator.api import SourceType, TaskSource
    from dagger_operator.tasks.sources import _hugging_face

    source = TaskSource(type=SourceType.SWE_BENCH, uri="org/name", split="train")
    for revision in (None, "{OLD}"):
        rows, commit = _hugging_face(source, revision)
        print([row["instance_id"] for row in rows], commit[0])
"""


def parquet(*ids: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"instance_id": id} for id in ids]), file)
    return file.getvalue()


FILES = {OLD: {"README.md": CARD, DATA: parquet("a", "b")}, NEW: {"README.md": CARD, DATA: parquet("c")}}


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub for one data set, whose newest commit is NEW."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0]).replace("/main/", f"/{NEW}/")
        commit = OLD if OLD in path else NEW
        name = path.partition(f"/datasets/org/name/resolve/{commit}/")[2]
        if name in FILES[commit]:
            self._answer(FILES[commit][name], **{"ETag": f'"{commit}{name}"', "X-Repo-Commit": commit})
        elif path == f"/api/datasets/org/name/tree/{commit}":
            self._answer(json.dumps([{"type": "directory", "path": "data", "oid": commit}]).encode())
        elif path == f"/api/datasets/org/name/tree/{commit}/data":
            self._answer(json.dumps([{"type": "file", "path": DATA, "size": len(FILES[commit][DATA]), "oid": commit}]).encode())
        elif path in ("/api/datasets/org/name", f"/api/datasets/org/name/revision/{commit}"):
            self._answer(
                json.dumps({"id": "org/name", "sha": commit, "siblings": [{"rfilename": file} for file in FILES[commit]]}).encode()
            )
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, data: bytes, **headers: str) -> None:
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.heavy
def test_a_data_set_comes_at_the_commit_that_is_named(hub: str, tmp_path: Path) -> None:
    # In a process of its own: the client reads its environment when it is imported.
    environ = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['c'] 2", "['a', 'b'] 1"]
