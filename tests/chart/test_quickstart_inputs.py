"""The quickstart's inputs lie where a cluster's run looks for them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dagger_operator.api import Storage, Tasks, load
from dagger_operator.serving.models import check_model, fetch, source
from dagger_operator.store.objects import Store
from dagger_operator.tasks.sources import load_held_out, load_training

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[2]


async def test_tasks_and_student_are_found_below_the_storage(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/storage"
    put = [sys.executable, ROOT / "examples" / "quickstart" / "inputs.py", url]
    first = subprocess.run(put, capture_output=True, text=True, check=True, timeout=240).stdout
    store = Store.open(Storage(url=url))
    text = (ROOT / "manifests" / "samples" / "quickstart" / "run.yaml").read_text()
    run = load(yaml.safe_load(text.replace("s3://dagger/quickstart", url)))
    tasks: Tasks = run.spec.tasks
    assert len(await load_training(tasks, store, {})) == 400 and len(await load_held_out(tasks, store, {})) == 100
    folder = await fetch(source(run.spec.student.model, store, "student.model"), store, tmp_path / "student", "student.model")
    check_model(folder, "student.model", run.spec.student.served)
    assert {f"{url}/{info.key}" for info in await store.list("inputs")} <= set(first.split())
