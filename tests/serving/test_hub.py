"""A model from a Hugging Face hub by the hub's own client: pinned to a commit, only what is needed, and its way told in bytes."""

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(3 << 20), "README.md": b"not wanted", "pytorch_model.bin": bytes(99)}


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub for one model."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path == f"/api/models/org/name/tree/{COMMIT}":
            self._answer(
                json.dumps([{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in FILES.items()]).encode()
            )
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": file, "size": len(data)} for file, data in FILES.items()]
            self._answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in FILES:
            self._answer(FILES[name], ETag=f'"{name}"', **{"X-Repo-Commit": COMMIT})
        else:
            self.send_error(404)

    def _answer(self, data: bytes, **headers: str) -> None:
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


SCRIPT = """
    import asyncio, sys
    from pathlib import Path
    from dagger_operator.api import Storage
    from dagger_operator.serving.models import Hub, commit, fetch
    from dagger_operator.store.objects import Store

    async def main(folder):
        async def tell(done, total):
            print(done, total)
        origin = Hub("org/name", await commit(Hub("org/name"), "student.model"))
        store = Store.open(Storage(url=f"file://{folder}/store"))
        print(origin.revision, await fetch(origin, store, folder / "model", "student.model", tell))

    asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.heavy
def test_a_model_comes_from_the_hub(hub: str, tmp_path: Path) -> None:
    # In a process of its own: the client reads its environment when it is imported.
    environ = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *told, last = done.stdout.splitlines()
    assert last == f"{COMMIT} {tmp_path}/model"
    total = len(FILES["config.json"]) + len(FILES["model.safetensors"])
    assert told and all(line.endswith(f" {total}") for line in told)
    assert sorted(path.name for path in (tmp_path / "model").iterdir() if path.is_file()) == ["config.json", "model.safetensors"]
