"""Where the commands take a run from: a file of YAML documents, or what this machine keeps."""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dagger_operator.api import KIND, DAggerRun, InvalidRun, Problem, load
from dagger_operator.api.run import NAME_PATTERN
from dagger_operator.local.acceptance import accept
from dagger_operator.local.folder import RunFolder, home


@dataclass(frozen=True)
class Documents:
    """One DAggerRun, and the Secrets that it names."""

    run: DAggerRun
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)


def read(path: Path) -> Documents:
    """Reads and validates a file; `-` is standard input.

    Raises `InvalidRun`, whose problems name document, field, value and remedy.
    """
    try:
        with path.open() if str(path) != "-" else open(0, closefd=False) as file:
            documents = [document for document in yaml.safe_load_all(file) if document is not None]
    except OSError as error:
        raise InvalidRun([Problem(str(path), "cannot be read", error.strerror or str(error))]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRun([Problem(str(path), "is no YAML", " ".join(str(error).split()))]) from None
    runs = [document for document in documents if _kind(document) == KIND]
    others = {_kind(document) for document in documents} - {KIND, "Secret"}
    if len(runs) != 1 or others:
        found = ", ".join(sorted(str(_kind(document)) for document in documents)) or "nothing"
        raise InvalidRun([Problem(str(path), f"holds {found}", f"write one document of kind {KIND}, and Secrets that it names")])
    secrets = dict(_secret(document) for document in documents if _kind(document) == "Secret")
    return Documents(load(runs[0]), secrets)


def known(run: str) -> Documents:
    """A run of this machine by its name, or one of any other place from a file: what cannot be a name is a file's.

    Raises `UnknownRun`, and what `read` raises.
    """
    if re.fullmatch(NAME_PATTERN, run):
        folder = RunFolder(home(), run)
        return Documents(folder.require(), folder.secrets())
    documents = read(Path(run))
    spec = accept(documents.run, None, Path.cwd()).spec  # with its paths taken from here
    return replace(documents, run=documents.run.model_copy(update={"spec": spec}))


def _kind(document: Any) -> Any:
    return document.get("kind") if isinstance(document, dict) else type(document).__name__


def _secret(document: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    name = (document.get("metadata") or {}).get("name")
    if not isinstance(name, str):
        raise InvalidRun([Problem("Secret.metadata.name", "missing", "a Secret needs a name")])
    values = {str(key): str(value) for key, value in (document.get("stringData") or {}).items()}
    for key, value in (document.get("data") or {}).items():
        try:
            values[key] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, TypeError):
            raise InvalidRun(
                [Problem(f"Secret {name}.data.{key}", "is no base64 text", "encode it, or use stringData for plain text")]
            ) from None
    return name, values
