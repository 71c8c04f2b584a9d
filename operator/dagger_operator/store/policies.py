"""Policy versions: a Hugging Face folder with a manifest, and the pointer to the version that should be served.

A version's name contains the digest of its contents. Files are written first and the manifest last, so a version with a manifest is
complete.
"""

import asyncio
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import SMALL_BYTES, DamagedObject, Store
from dagger_operator.store.progress import Tell, silent
from dagger_operator.store.records import Record
from dagger_operator.store.side_by_side import each
from dagger_operator.store.stage import StageFailure

ADAPTER = "adapter"
"""Folder of a version with its low-rank adapter by itself, if it has one; the version's weights have it merged."""

_MANIFEST = "manifest.json"
_REMEDY = (
    "a student: delete this version's folder and the training result that names it, then start its stage again; a base model: prepare again"
)


class PolicyFile(Record):
    size: int
    """Bytes."""
    sha256: str


class PolicyManifest(Record):
    """Contents of a policy version, and what it was made from."""

    version: str
    round: int
    """Round that made it; 0 is the initial student."""
    base_model: str
    parent: str | None
    """Version that training started from."""
    data_digest: str | None
    """Digest of the data set it was trained on."""
    files: dict[str, PolicyFile]
    """By path relative to the folder."""
    settings: dict[str, Any]
    """Training settings that were used."""
    software: dict[str, str]
    """Versions of the software that made it."""
    digest: str
    """SHA-256 over files, round, parent and data digest; the version is named after it."""

    @property
    def adapter(self) -> dict[str, PolicyFile]:
        """Files of its separate low-rank adapter; empty if it has none."""
        return {name: file for name, file in self.files.items() if name.startswith(f"{ADAPTER}/")}


class PolicyPointer(Record):
    """The version that should be served."""

    policy: str
    round: int


async def save_policy(
    store: Store,
    folder: Path,
    *,
    round: int,
    base_model: str,
    parent: str | None,
    data_digest: str | None,
    settings: Mapping[str, Any],
    software: Mapping[str, str],
    tell: Tell = silent,
) -> PolicyManifest:
    """Store a folder as a policy version. The same folder, round, parent and data give the same version, which is written once.
    `tell` is called with the progress in bytes."""
    files = await _digest_files(folder)
    if not files:
        raise StageFailure("NoCheckpoint", f"{folder} holds no files: a policy is a Hugging Face folder with config and safetensors")
    digest = _digest(files, round, parent, data_digest)
    version = f"r{round:03d}-{digest[:12]}"
    existing = await store.get(layout.policy_manifest(version))
    if existing is not None:
        return _parse(existing.data, version)
    manifest = PolicyManifest(
        version=version,
        round=round,
        base_model=base_model,
        parent=parent,
        data_digest=data_digest,
        files=files,
        settings=dict(settings),
        software=dict(software),
        digest=digest,
    )
    prefix = layout.policy(version)
    there = {info.key: info.size for info in await store.list(prefix)}
    stored, total = 0, sum(file.size for file in files.values())

    async def save(name: str) -> None:
        nonlocal stored
        # The version's name covers the files' digests, and objects appear whole: an object of this size is this file.
        if there.get(prefix + name) != files[name].size:
            await store.upload(prefix + name, folder / name)
        stored += files[name].size
        await tell(stored, total)

    await tell(0, total)
    await each(files, save)
    if not await store.create(layout.policy_manifest(version), manifest.model_dump_json(indent=1).encode()):
        return await policy_manifest(store, version)
    return manifest


async def policy_manifest(store: Store, version: str) -> PolicyManifest:
    """Return a version's manifest. Raises `DamagedObject` if it is missing or unreadable."""
    key = layout.policy_manifest(version)
    found = await store.get(key)
    if found is None:
        raise DamagedObject(key, "is not there: the version does not exist or was never stored whole", _REMEDY)
    return _parse(found.data, version)


async def load_policy(store: Store, version: str, folder: Path) -> PolicyManifest:
    """Download a version into `folder`, verifying every file by size and SHA-256. One caller per folder at a time.

    The folder appears atomically: it is built beside as `<folder>.partial`, in which a retry finds the files that were completed. A
    complete folder is used as it is. Raises `DamagedObject` if a file does not match the manifest.
    """
    manifest = await policy_manifest(store, version)
    if await asyncio.to_thread(_is_complete, folder, manifest):
        return manifest
    partial = folder.with_name(folder.name + ".partial")

    async def load(name: str) -> None:
        await _load_file(store, layout.policy(version) + name, manifest.files[name], partial / name)

    await each(manifest.files, load)
    await asyncio.to_thread(_finish, partial, folder, manifest)
    return manifest


async def load_adapter(store: Store, version: str, folder: Path) -> bool:
    """Download only a version's adapter into `folder`, verifying every file like `load_policy`. Returns False if it has none."""
    files = (await policy_manifest(store, version)).adapter
    for name, file in files.items():
        await _load_file(store, layout.policy(version) + name, file, folder / name.removeprefix(f"{ADAPTER}/"))
    return bool(files)


async def _load_file(store: Store, key: str, file: PolicyFile, path: Path) -> None:
    if await asyncio.to_thread(_is_file, path, file):
        return
    if not await store.download(key, path):
        raise DamagedObject(key, "is not there although the manifest names it", _REMEDY)
    size = (await asyncio.to_thread(path.stat)).st_size
    if size != file.size:
        raise DamagedObject(key, f"has {size} bytes instead of {file.size}: the checkpoint was cut short", _REMEDY)
    if await asyncio.to_thread(file_digest, path) != file.sha256:
        raise DamagedObject(key, "has another content than its manifest says (SHA-256 differs)", _REMEDY)


async def pointed(store: Store) -> PolicyPointer | None:
    """Return the version that should be served, or None before the run is prepared."""
    found = await store.get(layout.POLICY, SMALL_BYTES)
    return None if found is None else _pointer(found.data)


async def point_to(store: Store, policy: str, round: int) -> PolicyPointer:
    """Move the pointer forward, and return its new value: a pointer of a later round is left unchanged.

    Raises `StageFailure` for two versions of one round: a round's student is made only once.
    """
    wanted = PolicyPointer(policy=policy, round=round)
    while True:
        found = await store.get(layout.POLICY, SMALL_BYTES)
        if found is not None:
            current = _pointer(found.data)
            if current.round > round or current == wanted:
                return current
            if current.round == round:
                message = f"{layout.POLICY} says {current.policy} for round {round}, not {policy}: find out which stage made the second one"
                raise StageFailure("PointerConflict", message)
        if await store.swap(layout.POLICY, wanted.model_dump_json().encode(), found) is not None:
            return wanted


def _pointer(data: bytes) -> PolicyPointer:
    try:
        return PolicyPointer.model_validate_json(data)
    except ValidationError as error:
        remedy = "delete it and start the last finished prepare or publish stage's result again by deleting that result"
        raise DamagedObject(layout.POLICY, "is no policy pointer", remedy) from error


def _parse(data: bytes, version: str) -> PolicyManifest:
    key = layout.policy_manifest(version)
    try:
        manifest = PolicyManifest.model_validate_json(data)
    except ValidationError as error:
        raise DamagedObject(key, f"is no policy manifest: {error.errors()[0]['msg']}", _REMEDY) from error
    if manifest.version != version or manifest.digest != _digest(manifest.files, manifest.round, manifest.parent, manifest.data_digest):
        raise DamagedObject(key, "does not fit its own digest", _REMEDY)
    return manifest


def _digest(files: Mapping[str, PolicyFile], round: int, parent: str | None, data_digest: str | None) -> str:
    lines = [f"{name}\0{file.size}\0{file.sha256}" for name, file in sorted(files.items())]
    return hashlib.sha256("\n".join([f"{round}", parent or "", data_digest or "", *lines]).encode()).hexdigest()


async def _digest_files(folder: Path) -> dict[str, PolicyFile]:
    paths = await asyncio.to_thread(_paths, folder)
    files: dict[str, PolicyFile] = {}

    async def digest(name: str) -> None:
        files[name] = PolicyFile(size=paths[name].stat().st_size, sha256=await asyncio.to_thread(file_digest, paths[name]))

    await each(paths, digest)
    return dict(sorted(files.items()))


def _paths(folder: Path) -> dict[str, Path]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    paths.pop(_MANIFEST, None)
    return paths


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_file(path: Path, file: PolicyFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and file_digest(path) == file.sha256


def _is_complete(folder: Path, manifest: PolicyManifest) -> bool:
    try:
        known = PolicyManifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return False
    paths = {name: folder / name for name in manifest.files}
    return known == manifest and all(
        paths[name].is_file() and paths[name].stat().st_size == file.size for name, file in manifest.files.items()
    )


def _finish(partial: Path, folder: Path, manifest: PolicyManifest) -> None:
    (partial / _MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode())
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
