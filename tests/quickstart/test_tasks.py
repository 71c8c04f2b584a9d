"""Generated tasks: deterministic, one bug each, held-out pairs unseen in training, and rows that the task room reads."""

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import yaml

from dagger_operator.api import load
from dagger_operator.store.objects import Store
from dagger_operator.tasks.sources import load_tasks
from dagger_operator.tasks.task import ScriptGrading, Task
from tasks import HELPERS, ORIGINALS, generate, is_held_out, write


def lay_out(task: Task, folder: Path) -> None:
    for name, text in task.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def definitions(task: Task) -> set[tuple[str, str]]:
    modules = {name.removesuffix(".py"): text for name, text in task.files.items() if "/" not in name and name not in ("lib.py", "test.py")}
    return {(module, name) for module, text in modules.items() for name in re.findall(r"^(?:def )?(\w+)(?:\(| =)", text, re.MULTILINE)}


def test_the_same_seed_makes_the_same_tasks_and_another_seed_others() -> None:
    assert list(generate(3, 20, held_out=False)) == list(generate(3, 20, held_out=False))
    assert {str(task.files) for task in generate(3, 20, held_out=False)}.isdisjoint(
        str(task.files) for task in generate(4, 20, held_out=False)
    )


def test_held_out_tasks_use_pairs_of_module_and_name_that_training_never_shows() -> None:
    train = set[tuple[str, str]]().union(*(definitions(task) for task in generate(1, 300, held_out=False)))
    held_out = set[tuple[str, str]]().union(*(definitions(task) for task in generate(1, 100, held_out=True)))
    assert held_out and train.isdisjoint(held_out)
    assert all(is_held_out(module, name) for module, name in held_out)
    assert {name for _, name in held_out} <= {name for _, name in train}


def test_every_task_fails_its_check_and_its_hidden_check_and_its_copies_are_the_files(tmp_path: Path) -> None:
    for task in chain(generate(5, 10, held_out=False), generate(5, 5, held_out=True)):
        folder = tmp_path / task.id
        lay_out(task, folder)
        grading = task.grading
        assert isinstance(grading, ScriptGrading)
        for name, text in grading.files.items():
            (folder / name).write_text(text)
        for script in ("test.py", *grading.files):
            ended = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
            assert ended.returncode == 1 and ended.stderr.startswith("FAIL "), ended.stderr
        originals = {name.removeprefix(f"{ORIGINALS}/"): text for name, text in task.files.items() if name.startswith(ORIGINALS)}
        assert originals == {name: text for name, text in task.files.items() if "/" not in name}


def test_the_helpers_do_what_the_library_file_says() -> None:
    task = next(generate(1, 1, held_out=False))
    library: dict[str, object] = {}
    exec(task.files["lib.py"], library)
    for name, (_, function) in HELPERS.items():
        written = library[name]
        assert callable(written)
        assert all(written(a, b) == function(a, b) for a in range(10, 30) for b in range(80, 100))


async def test_the_manifest_is_valid_and_its_sources_read_the_rows(tmp_path: Path, quickstart: Path) -> None:
    run = load(yaml.safe_load((quickstart / "dagger-run.yaml").read_text()))
    write(tmp_path / "tasks.jsonl", chain(generate(1, 6, held_out=False), generate(1, 4, held_out=True)))
    storage = run.spec.storage.model_copy(update={"url": f"file://{tmp_path}/storage"})
    store = Store.open(storage)
    for source, expected in (
        (run.spec.tasks.source, generate(1, 6, held_out=False)),
        (run.spec.tasks.held_out.source, generate(1, 4, held_out=True)),
    ):
        loaded = await load_tasks(source.model_copy(update={"uri": str(tmp_path / "tasks.jsonl")}), store, {})
        assert sorted(loaded.tasks, key=lambda task: task.id) == list(expected)


def test_what_a_check_prints_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Where a wrong edit makes it meet a function, too: else the same seed would not give the same data."""
    task = next(generate(5, 1, held_out=False))
    lay_out(task, tmp_path)
    module, name = sorted(definitions(task))[0]
    check = re.sub(r"CHECKS = \[.*?\n\]", f"CHECKS = [({module!r}, {name!r}, (), 1)]", task.files["test.py"], flags=re.DOTALL)
    (tmp_path / f"{module}.py").write_text(f"def other(a, b): return a\n{name} = other\n")
    (tmp_path / "test.py").write_text(check)
    said = {subprocess.run([sys.executable, "test.py"], cwd=tmp_path, capture_output=True, text=True).stderr for _ in range(3)}
    assert said == {f"FAIL {name} got other want 1\n"}
