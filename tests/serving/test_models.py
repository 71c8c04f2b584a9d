"""A model that cannot be served is refused before anything is copied, by what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Serving, Storage
from dagger_operator.serving import models
from dagger_operator.serving.models import Folder, Hub, Stored, check_model, digest_folder, fetch, source
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import StageFailure

SERVED, TWICE = Serving(max_model_len=2048), Serving(max_model_len=4096)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(Storage(url=f"file://{tmp_path}/store"))


def test_a_model_is_a_folder_a_url_below_the_storage_or_an_id(store: Store, model: Path) -> None:
    assert source(str(model), store, "student.model") == Folder(model)
    assert source(f"file://{model}", store, "student.model") == Folder(model)
    assert source("Qwen/Qwen3-4B-Instruct-2507", store, "teacher.model") == Hub("Qwen/Qwen3-4B-Instruct-2507")


def test_a_url_below_the_storage_is_found_in_it() -> None:
    store = Store.open(Storage(url="s3://bucket/run", region="us-east-1"))
    assert source("s3://bucket/run/models/base/", store, "student.model") == Stored("models/base")
    with pytest.raises(StageFailure, match="write a URL that starts with s3://bucket/run/"):
        source("s3://other/models/base", store, "student.model")


@pytest.mark.heavy
async def test_a_model_in_the_storage_is_fetched_whole(s3: Any, model: Path, tmp_path: Path) -> None:
    store = s3.open()
    for path in model.iterdir():
        await store.upload(f"models/base/{path.name}", path)
    origin = source(f"{s3.url}/models/base", store, "student.model")
    folder = await fetch(origin, store, tmp_path / "fetched", "student.model")
    check_model(folder, "student.model", SERVED)
    assert digest_folder(folder) == digest_folder(model)
    with pytest.raises(StageFailure, match="there is nothing below models/other/"):
        await fetch(Stored("models/other"), store, tmp_path / "other", "student.model")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/no/such/folder", "there is no such folder .* on a claim of student.serving.pod.claims"),
        ("not a model!", "is no folder, and no Hugging"),
    ],
)
def test_what_is_none_of_them_is_refused(store: Store, model: str, said: str) -> None:
    with pytest.raises(StageFailure, match=said) as refused:
        source(model, store, "student.model")
    assert refused.value.reason == "ModelNotFound" and refused.value.permanent


def _cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def _index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda model: (model / "config.json").unlink(), "there is no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda model: (model / "config.json").write_text("{}"), "names no architectures"),
        (lambda model: (model / "model.safetensors").unlink(), "there are no weights"),
        (_cut, "it is cut short"),
        (lambda model: (model / "model.safetensors").write_bytes(b"PK\x03\x04 something else"), "is cut short or no safetensors file"),
        (_index, "model-00002.safetensors is named by the index and not there"),
        (lambda model: (model / "tokenizer.json").unlink(), "there is no tokenizer"),
        (lambda model: (model / "chat_template.jinja").unlink(), "has no chat template"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(model: Path, spoil: Any, said: str) -> None:
    check_model(model, "student.model", SERVED)
    spoil(model)
    with pytest.raises(StageFailure, match=said) as refused:
        check_model(model, "student.model", SERVED)
    assert refused.value.reason == "ModelIncomplete"


def test_a_context_beyond_the_models_positions_is_refused(model: Path) -> None:
    with pytest.raises(StageFailure, match=r"student.serving.maxModelLen is 4096, but the model has 2048 positions: write 2048 or less"):
        check_model(model, "student.model", TWICE)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}


def test_a_model_that_was_made_longer_is_served_as_long_as_it_says(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_scaling": YARN}))
    with pytest.raises(StageFailure, match="the model has 2048 positions"):
        check_model(model, "student.model", TWICE)  # as vLLM refuses it: the positions are to be written too
    (model / "config.json").write_text(json.dumps({**config, "rope_scaling": YARN, "max_position_embeddings": 4096}))
    check_model(model, "student.model", TWICE)


def test_overrides_lengthen_a_teacher_and_no_student_which_training_would_not_see(model: Path) -> None:
    overrides = json.dumps({"rope_scaling": YARN, "max_position_embeddings": 4096})
    longer = TWICE.model_copy(update={"extra_args": ["--hf-overrides", overrides]})
    check_model(model, "teacher.model", longer)
    with pytest.raises(StageFailure, match="--hf-overrides reach servers and not training"):
        check_model(model, "student.model", longer)


async def test_without_the_hubs_client_an_id_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(StageFailure, match=r"student\.model 'org/name' is on the hub.*install the extra 'rollout'"):
        await models.commit(Hub("org/name"), "student.model")
