"""A file of YAML documents: one DAggerRun, and the Secrets that it names."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dagger_operator.api import KIND, DAggerRun, InvalidRun, Problem, load


@dataclass(frozen=True)
class Documents:
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
