"""Resolves, fetches and checks models: a folder, a URL below the run's storage, or a Hugging Face id."""

import asyncio
import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import unquote

from dagger_operator.api import Serving
from dagger_operator.api.context import too_long
from dagger_operator.store.objects import ObjectInfo, Store
from dagger_operator.store.policies import file_digest
from dagger_operator.store.progress import REPORT_SECONDS, Tell, silent
from dagger_operator.store.stage import StageFailure

Field = Literal["student.model", "teacher.model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
"""Files that serving and training read; other formats of the same weights are not copied."""


@dataclass(frozen=True)
class Folder:
    path: Path


@dataclass(frozen=True)
class Stored:
    """A folder below the run's prefix in storage."""

    key: str


@dataclass(frozen=True)
class Hub:
    id: str
    revision: str | None = None
    """Commit; None for the newest."""


Source = Folder | Stored | Hub


def source(model: str, store: Store, field: Field) -> Source:
    """Return what a `model` field refers to. Raises `StageFailure` ModelNotFound if it is none of the three."""
    if "://" in model and not model.startswith("file://"):
        prefix = store.url.rstrip("/") + "/"
        if model.startswith(prefix):
            return Stored(model.removeprefix(prefix).strip("/"))
        raise StageFailure("ModelNotFound", f"{field} {model!r} is not below storage.url: write a URL that starts with {prefix}")
    path = Path(unquote(model.removeprefix("file://")) if model.startswith("file://") else model).expanduser()
    if path.is_dir():
        return Folder(path)
    if model.startswith(("/", ".", "~", "file://")):
        remedy = f"correct it; in a pod it has to be on a claim of {_claims(field)}, or put it below storage.url"
        raise StageFailure("ModelNotFound", f"{field} {model!r}: there is no such folder where this stage runs: {remedy}")
    if _HUB_ID.fullmatch(model):
        return Hub(model)
    raise StageFailure("ModelNotFound", f"{field} {model!r} is no folder, and no Hugging Face id such as 'Qwen/Qwen3-4B-Instruct-2507'")


def _claims(field: Field) -> str:
    return field.replace("model", "serving.pod.claims")


async def fetch(origin: Source, store: Store, into: Path, field: Field, tell: Tell = silent) -> Path:
    """Return the folder that holds the model: the origin's own, or `into`. A second call resumes where the first stopped. `tell` is called
    with the number of bytes received."""
    match origin:
        case Folder(path):
            return path
        case Stored(key):
            found = await _stored_files(origin, store, field)
            come, total = 0, sum(info.size for info in found)
            for info in found:
                await tell(come, total)
                target = into / info.key.removeprefix(key).lstrip("/")
                if not target.exists() or target.stat().st_size != info.size:
                    await store.download(info.key, target)
                come += info.size
            return into
        case Hub():
            total = await asyncio.to_thread(_size, origin, field)
            download = asyncio.create_task(asyncio.to_thread(_download, origin, into, field))
            while not download.done():
                await tell(min(total, await asyncio.to_thread(_bytes_below, into)), total)
                await asyncio.wait({download}, timeout=REPORT_SECONDS)
            return await download


async def commit(origin: Hub, field: Field) -> str:
    """Return the commit that a Hugging Face id currently refers to."""
    return await asyncio.to_thread(_commit, origin, field)


def _needs_hub(origin: Hub, field: Field) -> None:
    if find_spec("huggingface_hub") is None:
        remedy = "install the extra 'rollout', or name a folder or a URL below storage.url"
        raise StageFailure("MissingExtra", f"{field} {origin.id!r} is on the hub, and huggingface_hub is not installed: {remedy}")


def _commit(origin: Hub, field: Field) -> str:
    _needs_hub(origin, field)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        sha = HfApi().model_info(origin.id, revision=origin.revision, timeout=60).sha
    except (HfHubHTTPError, OSError, ValueError) as error:
        _refuse(origin, field, error)
    if sha is None:
        raise StageFailure("ModelNotFound", f"{field} {origin.id!r}: the hub names no commit of it")
    return sha


def _download(origin: Hub, into: Path, field: Field) -> Path:
    _needs_hub(origin, field)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(origin.id, revision=origin.revision, local_dir=into, allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        _refuse(origin, field, error)


def _size(origin: Hub, field: Field) -> int:
    """Return the size in bytes of the model's files that are wanted."""
    _needs_hub(origin, field)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().model_info(origin.id, revision=origin.revision, files_metadata=True, timeout=60).siblings or []
    except (HfHubHTTPError, OSError, ValueError) as error:
        _refuse(origin, field, error)
    return sum(file.size or 0 for file in files if _is_wanted(file.rfilename))


def _bytes_below(folder: Path) -> int:
    """Return the bytes received, including partial files (the hub's client keeps them in a hidden folder)."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


def _refuse(origin: Hub, field: Field, error: Exception) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, GatedRepoError):
        remedy = "accept its licence on the hub and give HF_TOKEN in a Secret that pod.envFrom names, or put a copy below storage.url"
        raise StageFailure("ModelGated", f"{field} {origin.id!r}: {said}: {remedy}") from error
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        raise StageFailure(
            "ModelNotFound", f"{field} {origin.id!r}: {said}: look for a typing error; a private model needs HF_TOKEN"
        ) from error
    remedy = f"where the hub cannot be reached, put the model below storage.url, or on a claim of {_claims(field)}, and name that"
    raise StageFailure("ModelUnreachable", f"{field} {origin.id!r}: {said}: {remedy}", permanent=False) from error


def check_model(folder: Path, field: Field, serving: Serving | None) -> None:
    """Raise `StageFailure` if a folder cannot be served: files missing or truncated, no chat template, or too short a context."""
    config = _json(folder / "config.json", field)
    if not config.get("architectures"):
        _incomplete(folder, field, "config.json names no architectures")
    shards = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = {str(name) for name in _json(index, field).get("weight_map", {}).values()}
        if missing := sorted(named - {shard.name for shard in shards}):
            _incomplete(folder, field, f"{missing[0]} is named by the index and not there")
    if not shards:
        _incomplete(folder, field, "there are no weights in *.safetensors files; convert other formats first")
    for shard in shards:
        if (wrong := _safetensors_flaw(shard)) is not None:
            _incomplete(folder, field, f"{shard.name} {wrong}")
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")):
        _incomplete(folder, field, "there is no tokenizer")
    if not _has_chat_template(folder, field):
        _incomplete(folder, field, "the tokenizer has no chat template (chat_template.jinja), so no agent can talk to it")
    _check_context(config, field, serving)


def model_files(folder: Path) -> list[Path]:
    """Return the files of a folder that make up the model, without a checkout's own files and other formats of the weights."""
    return sorted({path for pattern in _WANTED for path in folder.glob(pattern) if path.is_file()})


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 over names and contents of a model's files; blocks."""
    return _digest((path.name, file_digest(path)) for path in model_files(folder))


async def digest_stored(origin: Stored, store: Store, scratch: Path, field: Field) -> str:
    """Return the `digest_folder` of a stored model. Each file is in `scratch` only while it is read: there need not be room for all."""
    found: list[tuple[str, str]] = []
    for info in await _stored_files(origin, store, field):
        path = scratch / info.key.removeprefix(origin.key).lstrip("/")
        if path.parent == scratch and _is_wanted(path.name) and await store.download(info.key, path):
            found.append((path.name, await asyncio.to_thread(file_digest, path)))
            path.unlink()
    return _digest(found)


def _digest(files: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(f"{name}\0{digest}" for name, digest in files).encode()).hexdigest()


async def _stored_files(origin: Stored, store: Store, field: Field) -> list[ObjectInfo]:
    found = await store.list(origin.key)
    if not found:
        raise StageFailure("ModelNotFound", f"{field}: there is nothing below {origin.key}/ in {store.url}: correct it, or put it there")
    return found


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WANTED)


def _check_context(config: Mapping[str, Any], field: Field, serving: Serving | None) -> None:
    if serving is not None and (found := too_long(serving, config, trained=field == "student.model")) is not None:
        asked = f"{field.replace('model', 'serving.maxModelLen')} is {serving.max_model_len}"
        raise StageFailure("ContextTooLong", f"{asked}, but the model has {found.longest} positions: {found.remedy}")


def _has_chat_template(folder: Path, field: Field) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and bool(_json(settings, field).get("chat_template"))


def _safetensors_flaw(path: Path) -> str | None:
    """Return what is wrong with a file, as far as its header shows: a length, JSON with offsets, then exactly the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            return "is cut short or no safetensors file"
        try:
            tensors = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "is no safetensors file"
    return None if 8 + length + end == size else f"has {size} bytes instead of {8 + length + end}: it is cut short"


def _json(path: Path, field: Field) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        _incomplete(path.parent, field, f"there is no {path.name}")
    except ValueError as error:
        _incomplete(path.parent, field, f"{path.name} is no JSON ({error})")
    if not isinstance(value, dict):
        _incomplete(path.parent, field, f"{path.name} holds no JSON object")
    return value


def _incomplete(folder: Path, field: Field, what: str) -> NoReturn:
    remedy = "give a Hugging Face folder with config, tokenizer, chat template and safetensors"
    raise StageFailure("ModelIncomplete", f"{field}: {folder.name}: {what}: {remedy}")
