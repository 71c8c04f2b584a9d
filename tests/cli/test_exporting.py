"""`daggerctl export` of a run's students."""

import asyncio
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Storage, TrainingSummary, load
from dagger_operator.local.folder import RunFolder, locked
from dagger_operator.store.objects import Store
from dagger_operator.store.policies import save_policy
from dagger_operator.store.results import PrepareResult, TrainingResult, save_result


@pytest.fixture
def make_run(tmp_path: Path, document: dict[str, Any]) -> Any:
    """A run of three rounds of which so many are trained, with or without adapters; returns its versions."""
    document["spec"] |= {"rounds": 3, "storage": {"url": f"file://{tmp_path}/store"}}
    store = Store.open(Storage(url=document["spec"]["storage"]["url"]))

    async def fill(rounds: int, rank: int | None) -> list[str]:
        versions: list[str] = []
        for number in range(rounds + 1):
            folder = tmp_path / f"made-{number}"
            (folder / "adapter").mkdir(parents=True)
            (folder / "model.safetensors").write_text(f"weights of round {number}")
            if number and rank:
                (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": rank}))
                (folder / "adapter" / "adapter_model.safetensors").write_text(f"adapter of round {number}")
            parent = versions[-1] if versions else None
            made_from: dict[str, Any] = {"base_model": "m", "parent": parent, "data_digest": None, "settings": {}, "software": {}}
            versions.append((await save_policy(store, folder, round=number, **made_from)).version)
            if number == 0:
                await save_result(store, 0, PrepareResult(policy=versions[0], teacher="t"))
            else:
                summary = TrainingSummary(steps=1, labels=1, tokens=1, checkpoint=versions[-1], seconds=1)
                await save_result(store, number, TrainingResult(summary=summary, policy=versions[-1], losses=(1.0,)))
        return versions

    def make(rounds: int, rank: int | None) -> list[str]:
        RunFolder(tmp_path / ".dagger", "small").save(load(document))
        return asyncio.run(fill(rounds, rank))

    return make


def test_every_rounds_adapter_goes_beside_the_first_student_and_one_server_is_told_of_all(ctl: Any, make_run: Any, tmp_path: Path) -> None:
    base, *others = make_run(2, rank=12)
    answer = ctl("export", "small", "--adapters", "--to", "out")
    assert answer.returncode == 0, answer.stderr
    command = f"vllm serve out/{base} --served-model-name {base} --enable-lora --max-loras 3 --max-lora-rank 16 --lora-modules"
    assert answer.stdout == f"{command} {shlex.join(f'{version}=out/adapters/{version}' for version in others)}\n"
    assert (tmp_path / "out" / base / "model.safetensors").read_text() == "weights of round 0"
    for number, version in enumerate(others, 1):
        assert sorted(path.name for path in (tmp_path / "out" / "adapters" / version).iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert (tmp_path / "out" / "adapters" / version / "adapter_model.safetensors").read_text() == f"adapter of round {number}"
    assert not list((tmp_path / "out").glob("r001*")), "a round's merged weights are not needed"
    assert ctl("export", "small", "--adapters", "--to", "out").stdout == answer.stdout


def test_of_a_run_that_another_place_keeps_the_last_student_is_exported_from_what_kubectl_says(
    ctl: Any, make_run: Any, from_kubectl: dict[str, Any], tmp_path: Path
) -> None:
    versions = make_run(2, rank=None)
    (tmp_path / ".dagger" / "runs" / "small" / "run.json").unlink()
    assert "kubectl get daggerrun" in ctl("export", "small", "--to", "out").stderr
    for piped in (from_kubectl, {**from_kubectl, "status": {}}):
        answer = ctl("export", "-", "--to", "out", piped=[piped])
        assert (answer.returncode, answer.stdout) == (0, f"out/{versions[2]}\n"), answer.stderr
    assert (tmp_path / "out" / versions[2] / "model.safetensors").read_text() == "weights of round 2"
    assert ctl("export", "run.yaml", "--round", "1", "--to", "out", documents=[from_kubectl]).stdout == f"out/{versions[1]}\n"
    assert "round's rollouts are not done" in ctl("export", "-", "--what", "data", "--to", "out", piped=[from_kubectl]).stderr


@pytest.mark.parametrize(("rounds", "said"), [(1, "training.lora makes adapters"), (0, "no round of it is trained yet")])
def test_a_run_without_adapters_says_so(ctl: Any, make_run: Any, tmp_path: Path, rounds: int, said: str) -> None:
    make_run(rounds, rank=None)
    answer = ctl("export", "small", "--adapters", "--to", "out")
    assert answer.returncode == 2 and said in answer.stderr
    assert not (tmp_path / "out").exists()


def test_a_rounds_student_comes_out_as_it_was_stored(ctl: Any, make_run: Any, tmp_path: Path) -> None:
    versions = make_run(2, rank=12)
    answer = ctl("export", "small", "--round", "2", "--to", "out")
    assert answer.stdout.strip() == f"out/{versions[2]}"
    assert (tmp_path / "out" / versions[2] / "adapter" / "adapter_model.safetensors").read_text() == "adapter of round 2"
    assert ctl("export", "small", "--round", "3", "--to", "out").returncode == 2


@pytest.mark.parametrize(("to", "reason"), [("/proc/nowhere", "No such file or directory"), ("taken", "Not a directory")])
@pytest.mark.parametrize("arguments", [(), ("--adapters",)])
def test_a_folder_that_cannot_be_written_is_named_and_nothing_that_is_stored_is_blamed(
    ctl: Any, make_run: Any, tmp_path: Path, to: str, reason: str, arguments: tuple[str, ...]
) -> None:
    make_run(2, rank=12)
    (tmp_path / "taken").write_text("a file")
    answer = ctl("export", "small", "--to", f"{to}/out", *arguments)
    assert answer.returncode == 2
    assert f"error: {to}" in answer.stderr and reason in answer.stderr
    assert "storage" not in answer.stderr and "delete" not in answer.stderr and "Traceback" not in answer.stderr


def test_of_two_exports_into_one_folder_the_second_is_told_to_wait(ctl: Any, make_run: Any, tmp_path: Path) -> None:
    (base, *_) = make_run(1, rank=12)
    with locked(tmp_path / "out" / ".daggerctl.lock", "out is being written", "wait"):
        for arguments in ((), ("--adapters",)):
            answer = ctl("export", "small", "--to", "out", *arguments)
            assert answer.returncode == 2
            assert f"error: out is being written by process {os.getpid()}; wait until that export is done" in answer.stderr
    assert not list((tmp_path / "out").glob("r*"))
    assert ctl("export", "small", "--round", "0", "--to", "out").stdout == f"out/{base}\n"


def test_a_version_that_is_damaged_is_named_with_its_remedy(ctl: Any, make_run: Any, tmp_path: Path) -> None:
    (*_, last) = make_run(1, rank=None)
    (tmp_path / "store" / "policies" / last / "model.safetensors").unlink()
    answer = ctl("export", "small", "--to", "out")
    assert answer.returncode == 1
    assert f"{last}/model.safetensors: is not there although the manifest names it" in answer.stderr and "Traceback" not in answer.stderr
