"""The CustomResourceDefinition, generated from the models: `python -m dagger_operator.api.crd [ROOT]`.

A CRD accepts only a subset of OpenAPI (a structural schema): no references, no alternatives, no null. References are therefore inlined, an
optional field is one that is not required, and exclusive bounds are booleans next to the bound.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dagger_operator.api.reference import reference
from dagger_operator.api.run import GROUP, KIND, VERSION, DAggerRun, RunSpec
from dagger_operator.api.status import RunStatus

Schema = dict[str, Any]

MANIFEST = Path("manifests/crd/daggerruns.yaml")
REFERENCE = Path("docs/crd-reference.md")
_HEAD = "# Made from the models in operator/dagger_operator/api by `python -m dagger_operator.api.crd`; do not edit.\n"

_COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Round", "integer", ".status.round", 0),
    ("Resolved", "string", ".status.resolved", 0),
    ("Teacher", "string", ".status.teacherShare", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Rounds", "integer", ".spec.rounds", 1),
    ("Strategy", "string", ".spec.mixing.strategy", 1),
    ("Student", "string", ".spec.student.model", 1),
    ("GPU-hours", "string", ".status.gpuHours", 1),
    ("Done", "integer", ".status.progress.percent", 1),
    ("ETA", "string", ".status.estimatedCompletionTime", 1),
)


def crd() -> Schema:
    """Return the whole manifest."""
    plural = f"{KIND.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": plural,
                "singular": KIND.lower(),
                "shortNames": ["dgr"],
                "categories": ["all", "dagger"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
                    "schema": {"openAPIV3Schema": schema()},
                }
            ],
        },
    }


def schema() -> Schema:
    """Return the structural schema of a `DAggerRun`. The API server itself handles `metadata`."""
    return {
        "type": "object",
        "description": DAggerRun.__doc__,
        "required": ["spec"],
        "x-kubernetes-validations": [rule.schema() for rule in DAggerRun.cel],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(RunSpec),
            "status": structural(RunStatus),
        },
    }


def structural(model: type[BaseModel]) -> Schema:
    """Return a model's schema in the form that a CRD accepts."""
    whole = model.model_json_schema(by_alias=True)
    return _structural(whole, whole.get("$defs", {}))


def _structural(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    node = dict(node)
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            inner = definitions[node.pop("$ref").rsplit("/", 1)[-1]]
        else:
            (inner,) = (one for one in node.pop("anyOf") if one.get("type") != "null")
        node = {**inner, **node}  # the description at the place of use is more specific

    shaped: Schema = {}
    for key, value in node.items():
        if key in ("title", "$defs") or (key == "additionalProperties" and value is False):
            continue  # for `additionalProperties: false`: the API server prunes or refuses unknown fields by itself
        if key == "additionalProperties" and value is True:
            shaped["x-kubernetes-preserve-unknown-fields"] = True
            continue
        match key:
            case "description":
                shaped[key] = " ".join(value.split())
            case "properties":
                shaped[key] = {name: _structural(shape, definitions) for name, shape in value.items()}
            case "items" | "additionalProperties":
                shaped[key] = _structural(value, definitions)
            case "const":
                shaped["enum"] = [value]
            case "exclusiveMinimum" | "exclusiveMaximum":
                shaped[key.replace("exclusiveM", "m")] = value
                shaped[key] = True
            case _:
                shaped[key] = value
    if shaped.get("type") == "array":
        shaped.setdefault("x-kubernetes-list-type", "atomic")
    if shaped.get("type") == "integer":
        shaped["format"] = "int64"
    return dict(sorted(shaped.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)))


_ORDER = ("description", "type", "format", "enum", "default", "required")


def _column(name: str, kind: str, path: str, priority: int) -> Schema:
    return {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}


def rendered() -> dict[Path, str]:
    """Return the files generated from the models, by path relative to the repository's root."""
    manifest = yaml.safe_dump(crd(), sort_keys=False, width=140, allow_unicode=True)
    return {MANIFEST: _HEAD + manifest, REFERENCE: reference(schema())}


def main(root: Path) -> None:
    for path, text in rendered().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))
