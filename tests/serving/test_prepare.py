"""Prepare and the weights container: what is stored, pointed at and put into a pod, and what happens when they are run again."""

import asyncio
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.serving import weights
from dagger_operator.serving.models import Stored, digest_folder
from dagger_operator.serving.prepare import prepare
from dagger_operator.serving.shared import Shared
from dagger_operator.serving.weights import put_weights
from dagger_operator.store import layout
from dagger_operator.store.policies import point_to, pointed, policy_manifest, save_policy
from dagger_operator.store.progress import read_progress
from dagger_operator.store.results import PrepareResult, read_result
from dagger_operator.store.stage import Stage, StageFailure

Make = Callable[..., Stage]


async def test_the_first_student_is_stored_and_pointed_at(stage: Make, model: Path) -> None:
    (model / ".git").mkdir()
    (model / ".git" / "config").write_text("not part of the model")
    (model / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    await prepare(stage())
    store = stage().store
    result, pointer = await read_result(store, 0, PrepareResult), await pointed(store)
    assert result is not None and pointer is not None
    assert (pointer.policy, pointer.round) == (result.policy, 0)
    assert result.policy.startswith("r000-") and result.teacher.startswith("endpoint-")
    manifest = await policy_manifest(store, result.policy)
    assert sorted(manifest.files) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert manifest.base_model == str(model)
    progress = (await read_progress(store, 0, "prepare"))[0]
    size = sum(file.size for file in manifest.files.values())
    assert (progress.done, progress.total, progress.unit) == (size, size, "bytes")


async def test_prepare_run_again_changes_nothing(stage: Make) -> None:
    await prepare(stage())
    before = {info.key for info in await stage().store.list()}
    first = await read_result(stage().store, 0, PrepareResult)
    await stage().store.delete(layout.result(0, "prepare"))  # as if it had been killed before it wrote its result
    await prepare(stage())
    again = await read_result(stage().store, 0, PrepareResult)
    assert first is not None and again is not None and (again.policy, again.teacher) == (first.policy, first.teacher)
    assert {info.key for info in await stage().store.list()} == before


async def test_another_runs_prefix_is_refused(stage: Make, document: dict[str, Any]) -> None:
    await prepare(stage())
    document["metadata"]["name"] = "another-run"
    with pytest.raises(StageFailure, match="belongs to run default/a-run"):
        await prepare(stage())


async def test_a_student_below_the_storage_is_taken_from_there(stage: Make, document: dict[str, Any], model: Path) -> None:
    store = stage().store
    for path in model.iterdir():
        await store.upload(f"models/base/{path.name}", path)
    document["spec"]["student"]["model"] = f"{store.url.rstrip('/')}/models/base"
    # A folder's URL would be read as a folder of this machine, so it is not found under another name.
    assert document["spec"]["student"]["model"].startswith("file://")
    await prepare(stage())
    pointer = await pointed(store)
    assert pointer is not None and pointer.policy.startswith("r000-")


async def test_a_student_behind_an_endpoint_has_no_weights(stage: Make, document: dict[str, Any]) -> None:
    document["spec"]["student"] = {"model": "gpt", "endpoint": {"url": "http://127.0.0.1:9/v1"}}
    document["spec"]["training"] = {"mode": "Disabled"}
    await prepare(stage())
    result = await read_result(stage().store, 0, PrepareResult)
    assert result is not None and result.policy.startswith("endpoint-")
    assert await pointed(stage().store) is None


async def test_a_teacher_served_here_is_known_by_its_contents(
    stage: Make, document: dict[str, Any], tmp_path: Path, model: Path, socket_folder: Path
) -> None:
    document["spec"]["teacher"] = {"model": str(model), "serving": {"gpus": 0, "maxModelLen": 2048}}
    await prepare(stage())
    result = await read_result(stage().store, 0, PrepareResult)
    assert result is not None and result.teacher.startswith("teacher-")
    environ = {"DAGGER_ROLE": "teacher", "DAGGER_SHARED": str(socket_folder)}
    await put_weights(stage(**environ))
    assert Shared(socket_folder).current == result.teacher
    assert (socket_folder / "current" / "config.json").exists()
    (model / "tokenizer.json").write_text('{"changed": true}')
    with pytest.raises(StageFailure, match="is not what it was when the run was prepared"):
        await put_weights(stage(**environ))


async def test_a_node_of_several_waits_itself_for_what_is_away_since_all_are_begun_anew_when_it_ends(
    stage: Make, document: dict[str, Any], model: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PAUSE_SECONDS", 0.01)
    document["spec"]["teacher"] = {"model": str(model), "serving": {"gpus": 1, "nodes": 2, "maxModelLen": 2048}}
    environ = {"DAGGER_ROLE": "teacher", "DAGGER_SHARED": str(socket_folder)}
    waiting = asyncio.create_task(weights.weights(stage(**environ)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await prepare(stage())
    await asyncio.wait_for(waiting, 10)
    result = await read_result(stage().store, 0, PrepareResult)
    assert result is not None and Shared(socket_folder).current == result.teacher
    (model / "tokenizer.json").write_text('{"changed": true}')
    shutil.rmtree(socket_folder / "versions")
    with pytest.raises(StageFailure, match="is not what it was when the run was prepared"):
        await asyncio.wait_for(weights.weights(stage(**environ)), 10)  # no waiting mends this


async def test_of_one_node_the_kubelet_waits(stage: Make, socket_folder: Path) -> None:
    with pytest.raises(StageFailure, match="the prepare stage comes first"):
        await asyncio.wait_for(weights.weights(stage(DAGGER_ROLE="student", DAGGER_SHARED=str(socket_folder))), 10)


async def test_a_teacher_in_the_storage_is_served_from_there_and_is_known_by_its_contents(
    stage: Make, document: dict[str, Any], model: Path, socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a URL below `storage.url`. Of a storage that is a folder such a URL is one of this machine's folders, so it is said here."""
    monkeypatch.setattr(weights, "source", lambda *_: Stored("models/teacher"))
    document["spec"]["teacher"] = {"model": "s3://bucket/run/models/teacher", "serving": {"gpus": 0, "maxModelLen": 2048}}
    environ = {"DAGGER_ROLE": "teacher", "DAGGER_SHARED": str(socket_folder)}
    store = stage().store
    with pytest.raises(StageFailure, match="there is nothing below models/teacher/"):
        await prepare(stage())
    for path in model.iterdir():
        await store.upload(f"models/teacher/{path.name}", path)
    await store.put("models/teacher/original/consolidated.pth", b"the same weights in another form")
    await prepare(stage())
    result = await read_result(store, 0, PrepareResult)
    assert result is not None and result.teacher == weights._named(digest_folder(model)), "as in a folder"
    assert not list((stage().scratch / "teacher").iterdir()), "a name needs no room"
    await put_weights(stage(**environ))
    assert Shared(socket_folder).current == result.teacher
    assert digest_folder(socket_folder / "current") == digest_folder(model)
    await store.put("models/teacher/tokenizer.json", b'{"changed": true}')
    await put_weights(stage(**environ))  # what is here is whole
    shutil.rmtree(socket_folder / "versions")
    with pytest.raises(StageFailure, match="is not what it was when the run was prepared"):
        await put_weights(stage(**environ))


async def test_weights_are_put_where_vllm_looks_and_old_ones_removed(stage: Make, tmp_path: Path, model: Path, socket_folder: Path) -> None:
    environ = {"DAGGER_ROLE": "student", "DAGGER_SHARED": str(socket_folder)}
    with pytest.raises(StageFailure, match="the prepare stage comes first") as refused:
        await put_weights(stage(**environ))
    assert not refused.value.permanent
    await prepare(stage())
    first = await pointed(stage().store)
    assert first is not None
    await put_weights(stage(**environ))
    await put_weights(stage(**environ))
    assert Shared(socket_folder).current == first.policy
    (model / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "trained": True}))
    second = await save_policy(
        stage().store, model, round=1, base_model="b", parent=first.policy, data_digest=None, settings={}, software={}
    )
    await point_to(stage().store, second.version, 1)
    await put_weights(stage(**environ))
    assert Shared(socket_folder).current == second.version
    assert "trained" in (socket_folder / "current" / "config.json").read_text()
    assert [path.name for path in (socket_folder / "versions").iterdir()] == [second.version]


def test_a_socket_that_no_unix_socket_may_be_called_is_refused() -> None:
    with pytest.raises(StageFailure, match="use a folder with a shorter path"):
        Shared(Path("/tmp") / ("x" * 100))


async def test_only_the_socket_of_a_server_that_is_gone_is_removed(socket_folder: Path) -> None:
    shared = Shared(socket_folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(shared.socket))  # bound, not listening: vLLM while it loads
        shared.remove_stale_socket()
        assert shared.socket.exists()
    shared.remove_stale_socket()
    assert not shared.socket.exists()
    await asyncio.to_thread(shared.remove_stale_socket)
