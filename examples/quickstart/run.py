"""The quickstart: makes tasks and a student, starts the teacher, and runs `dagger-run.yaml` to its end.

    python examples/quickstart/run.py

Everything is written to `.dagger` below the current folder. It can be interrupted at any moment: the same command resumes where it stopped.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tasks import generate, write

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "dagger-run.yaml"
FOLDER = Path(".dagger/quickstart")
"""Where `dagger-run.yaml` looks for tasks and student, relative to the current folder."""
PORT = 8971
TRAIN, HELD_OUT = 400, 100


def make_inputs(folder: Path, seed: int, *, train: int, held_out: int) -> None:
    """Make tasks and student; existing ones are kept, so that an interrupted run resumes with the same."""
    if not (folder / "tasks.jsonl").exists():
        write(folder / "tasks.jsonl", chain(generate(seed, train, held_out=False), generate(seed, held_out, held_out=True)))
    if not (folder / "student").exists():
        partial = folder / "student.partial"
        shutil.rmtree(partial, ignore_errors=True)
        made = subprocess.run(
            [sys.executable, HERE / "student.py", "--seed", str(seed), "--out", partial], check=True, capture_output=True, text=True
        )
        partial.rename(folder / "student")
        print(f"made a student of {json.loads(made.stdout)['parameters']:,} random parameters")


def manifest_for(port: int) -> Path:
    """Return the manifest, or a copy that looks for the teacher on another port."""
    if port == PORT:
        return MANIFEST
    copy = FOLDER / MANIFEST.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(MANIFEST.read_text().replace(f"127.0.0.1:{PORT}/", f"127.0.0.1:{port}/"))
    return copy


@contextlib.contextmanager
def serving_teacher(log: Path, port: int = PORT) -> Iterator[None]:
    """Serve the teacher's endpoint in a process of its own."""
    if answers(port):
        sys.exit(f"error: port {port} is taken, where the teacher should answer: free it, or choose another with --port")
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, HERE / "teacher.py", "--port", str(port)], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the teacher did not start; see {log}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def daggerctl(*arguments: str | Path) -> int:
    """Run the command line in the foreground; Ctrl-C reaches it too, and it shuts down cleanly."""
    process = subprocess.Popen([sys.executable, "-m", "dagger_operator.cli", *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier quickstart")
    parser.add_argument("--port", type=int, default=PORT, help="where the teacher listens")
    options = parser.parse_args()
    if options.fresh:
        for old in (FOLDER, Path(".dagger/runs/quickstart")):
            shutil.rmtree(old, ignore_errors=True)
    started = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_inputs(FOLDER, seed=1, train=TRAIN, held_out=HELD_OUT)
    with serving_teacher(FOLDER / "teacher.log", options.port):
        code = daggerctl("run", manifest_for(options.port))
    print(f"{time.monotonic() - started:.0f} seconds in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
