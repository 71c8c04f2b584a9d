"""`docs/crd-reference.md` from the CRD's schema: what `kubectl explain` says, on one page."""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

_HEAD = """# DAggerRun reference

Made from the models in `operator/dagger_operator/api` by `python -m dagger_operator.api.crd`; do not edit.
Required fields have no default. An optional field without a default may be left out.
"""


def reference(schema: Schema) -> str:
    """Markdown: a section for each object, a row for each field."""
    sections = [_HEAD]
    for path in ("spec", "status"):
        for name, shape in _objects(path, schema["properties"][path]):
            sections.append(_section(name, shape))
    return "\n".join(sections)


def _objects(path: str, shape: Schema) -> Iterator[tuple[str, Schema]]:
    if shape.get("properties"):
        yield path, shape
        for name, inner in shape["properties"].items():
            yield from _objects(f"{path}.{name}", inner)
    elif shape.get("items"):
        yield from _objects(f"{path}[]", shape["items"])


def _section(path: str, shape: Schema) -> str:
    lines = [f"## {path}", "", shape.get("description", ""), "", "| field | type | default | meaning |", "|---|---|---|---|"]
    required = shape.get("required", ())
    for name, inner in shape["properties"].items():
        lines.append(f"| `{name}` | {_type(inner)} | {_default(inner, name in required)} | {_cell(inner.get('description', ''))} |")
    rules = [rule["message"] for rule in shape.get("x-kubernetes-validations", ())]
    if rules:
        lines += ["", "Rules:", "", *(f"- {message}" for message in rules)]
    return "\n".join([*lines, ""])


def _type(shape: Schema) -> str:
    if "enum" in shape:
        return ", ".join(f"`{word}`" for word in shape["enum"])
    kind = str(shape.get("type"))
    if kind == "array":
        kind = f"list of {shape['items'].get('type')}"
    elif kind == "object" and isinstance(shape.get("additionalProperties"), Mapping):
        kind = f"map to {shape['additionalProperties'].get('type')}"
    bounds = []
    for low, high in (("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems")):
        if low in shape:
            bounds.append(f"{'>' if shape.get('exclusiveMinimum') else '≥'} {_number(shape[low])}")
        if high in shape:
            bounds.append(f"{'<' if shape.get('exclusiveMaximum') else '≤'} {_number(shape[high])}")
    if not bounds:
        return kind
    counted = {"string": " characters", "array": " items"}.get(str(shape.get("type")), "")
    return f"{kind}, {', '.join(bounds)}{counted}"


def _default(shape: Schema, required: bool) -> str:
    if required:
        return "**required**"
    default = shape.get("default")
    if default is None:
        return ""
    return "see below" if default == {} else f"`{_cell(_literal(default))}`"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_literal(part)}" for key, part in value.items()) + "}"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
