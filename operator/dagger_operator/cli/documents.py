"""Where the commands read a run from: a file of YAML documents, or this machine's runs."""

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
    """Reads numbers and booleans as kubectl reads and writes them: PyYAML alone reads `3e-06`, `0o17` and `y` as text. Everything else
    is unchanged."""

    bool_values = {**yaml.SafeLoader.bool_values, "y": True, "n": False}


def _integer(loader: _Loader, node: Any) -> int:
    """Construct an integer; PyYAML recognizes base prefixes in lower case only, including `0o`."""
    return int(loader.construct_yaml_int(yaml.ScalarNode(node.tag, str(loader.construct_scalar(node)).lower())))


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number or a boolean."""


_INTEGER = "tag:yaml.org,2002:int"
_ALSO = (
    ("tag:yaml.org,2002:bool", r"[yYnN]", "yYnN"),
    (_INTEGER, r"[-+]?_*([1-9][0-9_]*|0_*([bB]_*[01][01_]*|[oO]_*[0-7][0-7_]*|[xX]_*[0-9a-fA-F][0-9a-fA-F_]*))", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?_*(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE]_*[-+]?_*[0-9][0-9_]*)?",
        "-+.0123456789",
    ),
)
"""What go-yaml resolves in these ways (it ignores underscores in places), by first characters; PyYAML's own resolvers come first."""
for _tag, _pattern, _first in _ALSO:
    for _one in (_Loader, _Dumper):
        _one.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_INTEGER, _integer)


@dataclass(frozen=True)
class Documents:
    """One DAggerRun, and the Secrets that it names."""

    run: DAggerRun
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)


def read(path: Path) -> Documents:
    """Read and validate a file; `-` is standard input.

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
    """Return a run as YAML that `read` and kubectl can read back."""
    return yaml.dump(run.wire(), Dumper=_Dumper, sort_keys=False)


def known(run: str) -> Documents:
    """Return a run of this machine by name, or a run of any origin from a file: what cannot be a name is taken for a file.

    Raises `UnknownRun`, and what `read` raises.
    """
    if re.fullmatch(NAME_PATTERN, run):
        folder = RunFolder(home(), run)
        return Documents(folder.require(), folder.secrets())
    documents = read(Path(run))
    spec = accept(documents.run, None, Path.cwd()).spec  # its relative paths resolved against the current folder
    return replace(documents, run=documents.run.model_copy(update={"spec": spec}))


def _kind(document: Any) -> str:
    return str(document.get("kind")) if isinstance(document, dict) else type(document).__name__


def _secret(document: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        raise InvalidRun([Problem("Secret.metadata.name", "missing", "a Secret needs a name")])
    values: dict[str, str] = {}
    for part, text in (("data", _decoded), ("stringData", _plain)):  # stringData wins, as on an API server
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
    if not isinstance(value, str):  # YAML has converted it, and its text is lost
        raise InvalidRun([Problem(field, "is no text", "write it in quotes")])
    return value
