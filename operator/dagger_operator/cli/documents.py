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


class _Loader(yaml.SafeLoader):
    """Takes for numbers what kubectl takes for numbers, and writes: PyYAML alone reads `3e-06` as text. All else stays as it is."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"), list("-+.0123456789"))
"""What go-yaml resolves to a float; where PyYAML knows better already, as of integers, that goes before."""
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


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
            documents = [document for document in yaml.load_all(file, _Loader) if document is not None]
    except OSError as error:
        raise InvalidRun([Problem(str(path), "cannot be read", error.strerror or str(error))]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRun([Problem(str(path), "is no YAML", " ".join(str(error).split()))]) from None
    runs = [document for document in documents if _kind(document) == KIND]
    others = set(map(_kind, documents)) - {KIND, "Secret"}
    if len(runs) != 1 or others:
        found = ", ".join(sorted(map(_kind, documents))) or "nothing"
        raise InvalidRun([Problem(str(path), f"holds {found}", f"write one document of kind {KIND}, and Secrets that it names")])
    secrets = dict(_secret(document) for document in documents if _kind(document) == "Secret")
    return Documents(load(runs[0]), secrets)


def written(run: DAggerRun) -> str:
    """A run as YAML that `read` and kubectl read back."""
    return yaml.dump(run.wire(), Dumper=_Dumper, sort_keys=False)


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


def _kind(document: Any) -> str:
    return str(document.get("kind")) if isinstance(document, dict) else type(document).__name__


def _secret(document: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        raise InvalidRun([Problem("Secret.metadata.name", "missing", "a Secret needs a name")])
    values: dict[str, str] = {}
    for part, text in (("data", _decoded), ("stringData", _plain)):  # the latter wins, as on an API server
        entries = document.get(part) or {}
        if not isinstance(entries, dict):
            raise InvalidRun([Problem(f"Secret {name}.{part}", "is no mapping", "write a line `key: value` for each of its values")])
        values |= {str(key): text(f"Secret {name}.{part}.{key}", value) for key, value in entries.items()}
    return name, values


def _decoded(field: str, value: Any) -> str:
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, TypeError):
        raise InvalidRun([Problem(field, "is no base64 text", "encode it, or use stringData for plain text")]) from None


def _plain(field: str, value: Any) -> str:
    if not isinstance(value, str):  # YAML has made something else of it, and its text is lost
        raise InvalidRun([Problem(field, "is no text", "write it in quotes")])
    return value
