"""Accepts a run on this machine: makes paths absolute, assigns identity, checks edits against the existing run."""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dagger_operator.api import DAggerRun, InvalidRun, Problem, RunSpec
from dagger_operator.api.run import refused_edits


def accept(new: DAggerRun, existing: DAggerRun | None, folder: Path) -> DAggerRun:
    """Return what an API server would store for `new`: a stable uid, a generation that counts edits, the status kept.

    Relative paths (`./...`, `file://./...`) are resolved against `folder`. Raises `InvalidRun` for a forbidden edit.
    """
    spec = _absolute(new.spec, folder)
    if existing is None:
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata = new.metadata.model_copy(update={"uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": created})
        return new.model_copy(update={"metadata": metadata, "spec": spec, "status": None})
    refused = refused_edits(existing.spec, spec)
    if refused:
        raise InvalidRun([Problem(f"run {new.metadata.name!r}", "exists already", message) for message in refused])
    generation = (existing.metadata.generation or 1) + (existing.spec != spec)
    metadata = existing.metadata.model_copy(update={"generation": generation})
    return existing.model_copy(update={"metadata": metadata, "spec": spec})


def annotated(run: DAggerRun, name: str, value: str) -> DAggerRun:
    """Return the run with an annotation set."""
    annotations = {**run.metadata.annotations, name: value}
    return run.model_copy(update={"metadata": run.metadata.model_copy(update={"annotations": annotations})})


def as_used_here(run: DAggerRun) -> DAggerRun:
    """Return the run without what does not apply to one machine: another namespace, a queue, several nodes for one server."""
    spec = run.spec
    update: dict[str, Any] = {"kueue": None, "sandbox": spec.sandbox.model_copy(update={"namespace": None})}
    if (serving := spec.teacher.serving) is not None:
        update["teacher"] = spec.teacher.model_copy(update={"serving": serving.model_copy(update={"nodes": 1})})
    return run.model_copy(update={"spec": spec.model_copy(update=update)})


def _absolute(spec: RunSpec, folder: Path) -> RunSpec:
    def path(text: str) -> str:
        scheme, separator, rest = text.partition("://") if text.startswith("file://") else ("", "", text)
        return scheme + separator + str((folder / rest).resolve()) if rest.startswith(("./", "../")) else text

    wire: dict[str, Any] = spec.wire()
    for place in (wire["student"], wire["teacher"]):
        place["model"] = path(place["model"])
    for source in (wire["tasks"]["source"], wire["tasks"]["heldOut"]["source"]):
        source["uri"] = path(source["uri"])
    wire["storage"]["url"] = path(wire["storage"]["url"])
    return RunSpec.model_validate(wire)
