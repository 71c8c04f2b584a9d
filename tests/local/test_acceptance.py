"""This machine takes a run as an API server would."""

from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import DAggerRun, InvalidRun, load
from dagger_operator.local.acceptance import accept, annotated, as_used_here
from dagger_operator.local.folder import InUse, RunFolder, UnknownRun


def _run(**spec: Any) -> DAggerRun:
    tasks = {"source": {"type": "JSONL", "uri": "./tasks.jsonl"}, "heldOut": {"source": {"type": "JSONL", "uri": "/abs/held.jsonl"}}}
    common = {
        "student": {"model": "./student"},
        "teacher": {"model": "org/name", "endpoint": {"url": "http://127.0.0.1:9/v1"}},
        "tasks": tasks,
        "storage": {"url": "file://./store"},
    }
    return load(
        {"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": {"name": "one"}, "spec": {**common, **spec}}
    )


def test_a_new_run_gets_an_identity_and_absolute_paths(tmp_path: Path) -> None:
    run = accept(_run(), None, tmp_path)
    assert run.metadata.uid and run.metadata.generation == 1
    assert run.spec.student.model == str(tmp_path / "student")
    assert run.spec.storage.url == f"file://{tmp_path}/store"
    assert run.spec.tasks.source.uri == str(tmp_path / "tasks.jsonl")
    assert (run.spec.tasks.held_out.source.uri, run.spec.teacher.model) == ("/abs/held.jsonl", "org/name")


def test_the_same_file_again_changes_nothing(tmp_path: Path) -> None:
    run = accept(_run(), None, tmp_path)
    assert accept(_run(), run, tmp_path) == run


def test_an_allowed_edit_keeps_the_identity_and_counts_the_generation(tmp_path: Path) -> None:
    run = accept(_run(), None, tmp_path)
    edited = accept(_run(rounds=7), run, tmp_path)
    assert (edited.metadata.uid, edited.metadata.generation, edited.spec.rounds) == (run.metadata.uid, 2, 7)


def test_a_refused_edit_says_what_to_do_instead(tmp_path: Path) -> None:
    run = accept(_run(), None, tmp_path)
    with pytest.raises(InvalidRun, match=r"spec\.seed is immutable, .*: make a new run with a new name"):
        accept(_run(seed=1), run, tmp_path)


def test_a_run_survives_being_written_and_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    run = annotated(accept(_run(), None, tmp_path), "dagger-operator.dev/retry", "1")
    folder.save(run)
    assert folder.load() == run


def test_secrets_are_kept_for_this_user_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    folder.save_secrets({"key": {"token": "x"}})
    assert (folder.path / "secrets.json").stat().st_mode & 0o077 == 0
    assert folder.secrets() == {"key": {"token": "x"}}


def test_a_run_has_one_supervisor(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "one").locked(), pytest.raises(InUse, match="daggerctl status one"), RunFolder(tmp_path, "one").locked():
        pass


def test_an_unknown_run_is_named_beside_those_that_there_are(tmp_path: Path) -> None:
    RunFolder(tmp_path, "there").save(accept(_run(), None, tmp_path))
    with pytest.raises(UnknownRun, match="runs there: there"):
        RunFolder(tmp_path, "absent").require()


def test_what_only_a_cluster_can_use_is_left_out_and_not_forgotten() -> None:
    serving = {"model": "t", "serving": {"gpus": 8, "nodes": 2}}
    stored = _run(kueue={"queueName": "gpus"}, sandbox={"namespace": "sandboxes"}, teacher=serving)
    used = as_used_here(stored)
    assert (used.spec.kueue, used.spec.sandbox.namespace) == (None, None)
    assert used.spec.teacher.serving is not None
    assert used.spec.teacher.serving.nodes == 1
    assert stored.spec.kueue is not None
