"""Policy versions arrive whole or not at all, and the pointer never goes back."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.policies import (
    PolicyManifest,
    PolicyPointer,
    load_adapter,
    load_policy,
    point_to,
    pointed,
    policy_manifest,
    save_policy,
)
from dagger_operator.store.stage import StageFailure


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "nested").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "nested" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


async def save(store: Store, folder: Path, **more: Any) -> PolicyManifest:
    made_from: dict[str, Any] = {"round": 1, "base_model": "tiny", "parent": "r000-0", "data_digest": "d" * 64, **more}
    return await save_policy(store, folder, **made_from, settings={"lr": 1e-3}, software={"torch": "2"})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"}


async def test_a_version_comes_back_as_it_was(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    saved = await save(store, checkpoint)
    assert saved.version.startswith("r001-") and len(saved.version) == len("r001-") + 12
    assert await load_policy(store, saved.version, tmp_path / "served") == saved == await policy_manifest(store, saved.version)
    assert content(tmp_path / "served") == content(checkpoint)
    assert not (tmp_path / "served.partial").exists()


async def test_a_version_is_named_after_what_it_was_made_from(store: Store, checkpoint: Path) -> None:
    first = await save(store, checkpoint)
    assert await save(store, checkpoint) == first
    others = [await save(store, checkpoint, **change) for change in ({"round": 2}, {"parent": "r000-1"}, {"data_digest": None})]
    (checkpoint / "config.json").write_text("{}")
    assert len({first.version, *(other.version for other in others), (await save(store, checkpoint)).version}) == 5


async def test_a_loaded_folder_stored_again_is_the_same_version(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    first = await save(store, checkpoint)
    await load_policy(store, first.version, tmp_path / "served")
    assert await save(store, tmp_path / "served") == first


async def test_an_adapter_comes_by_itself_and_whole(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    plain = await save(store, checkpoint)
    assert not await load_adapter(store, plain.version, tmp_path / "none")
    (checkpoint / "adapter").mkdir()
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(b"a" * 10)
    saved = await save(store, checkpoint)
    assert await load_adapter(store, saved.version, tmp_path / "own")
    assert content(tmp_path / "own") == {"adapter_model.safetensors": b"a" * 10}
    await store.put(layout.policy(saved.version) + "adapter/adapter_model.safetensors", b"b" * 10)
    with pytest.raises(DamagedObject, match="SHA-256"):
        await load_adapter(store, saved.version, tmp_path / "other")


async def test_a_version_that_was_never_stored_whole_does_not_load(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    saved = await save(store, checkpoint)
    await store.delete(layout.policy_manifest(saved.version))
    with pytest.raises(DamagedObject, match="never stored whole"):
        await load_policy(store, saved.version, tmp_path / "served")
    assert not (tmp_path / "served").exists()
    assert await save(store, checkpoint) == saved, "the stage that is started again completes it"


@pytest.mark.parametrize("damage", ["cut short", "another content", "is not there"])
async def test_a_damaged_checkpoint_names_the_file_and_is_never_served(store: Store, checkpoint: Path, tmp_path: Path, damage: str) -> None:
    saved = await save(store, checkpoint)
    key = layout.policy(saved.version) + "model.safetensors"
    weights = (checkpoint / "model.safetensors").read_bytes()
    if damage == "is not there":
        await store.delete(key)
    else:
        await store.put(key, weights[:-1] if damage == "cut short" else weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(DamagedObject, match=damage) as found:
        await load_policy(store, saved.version, tmp_path / "served")
    assert found.value.key == key and not (tmp_path / "served").exists()
    await store.put(key, weights)
    await load_policy(store, saved.version, tmp_path / "served")
    assert content(tmp_path / "served") == content(checkpoint)


async def test_a_complete_folder_is_used_and_an_incomplete_one_is_made_anew(store: Store, checkpoint: Path, tmp_path: Path) -> None:
    saved = await save(store, checkpoint)
    served = tmp_path / "served"
    await load_policy(store, saved.version, served)
    await store.delete(layout.policy(saved.version) + "config.json")
    await load_policy(store, saved.version, served)
    (served / "config.json").unlink()
    with pytest.raises(DamagedObject, match=r"config\.json"):
        await load_policy(store, saved.version, served)


async def test_an_empty_folder_is_no_policy(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageFailure, match="holds no files"):
        await save(store, tmp_path / "empty")


async def test_the_pointer_only_goes_forward(store: Store) -> None:
    assert await pointed(store) is None
    assert await point_to(store, "r000-a", 0) == PolicyPointer(policy="r000-a", round=0)
    assert await point_to(store, "r002-b", 2) == PolicyPointer(policy="r002-b", round=2)
    assert await point_to(store, "r001-c", 1) == PolicyPointer(policy="r002-b", round=2)
    assert await point_to(store, "r002-b", 2) == await pointed(store) == PolicyPointer(policy="r002-b", round=2)
    with pytest.raises(StageFailure, match="r002-other"):
        await point_to(store, "r002-other", 2)


async def test_racing_publishers_end_at_the_newest(store: Store) -> None:
    await asyncio.gather(*(point_to(store, f"r{number:03d}-x", number) for number in range(12)))
    assert await pointed(store) == PolicyPointer(policy="r011-x", round=11)
