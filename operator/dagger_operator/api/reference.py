"""Generates `docs/crd-reference.md` from the CRD's schema: the content of `kubectl explain`, on one page."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]

_HEAD = """# DAggerRun reference

Made from the models in `operator/dagger_operator/api` by `python -m dagger_operator.api.crd`; do not edit.
Required fields have no default. An optional field without a default may be left out. Objects that have the same fields share a section.
"""


@dataclass(frozen=True)
class _Section:
    shape: Schema
    uses: dict[str, str]
    """Descriptions of the object, by the path of each use; the first path is the heading."""

    @property
    def heading(self) -> str:
        return next(iter(self.uses))


def reference(schema: Schema) -> str:
    """Return Markdown with a section for each kind of object and a row for each field."""
    sections: dict[str, _Section] = {}
    for name in ("spec", "status"):
        _gather(name, schema["properties"][name], sections)
    return "\n".join([_HEAD, *(_text(section, sections) for section in sections.values())])


def _gather(path: str, shape: Schema, sections: dict[str, _Section]) -> None:
    """Add this object and its nested objects to `sections`, keyed by `_key`."""
    if shape.get("items"):
        _gather(f"{path}[]", shape["items"], sections)
    elif shape.get("properties"):
        sections.setdefault(_key(shape), _Section(shape, {})).uses[path] = shape.get("description", "")
        for name, inner in shape["properties"].items():
            _gather(f"{path}.{name}", inner, sections)


def _key(shape: Schema) -> str:
    """Return a key that is equal for objects with the same fields and rules, however they are described where they are used."""
    return json.dumps({name: shape.get(name) for name in ("properties", "required", "x-kubernetes-validations")}, sort_keys=True)


def _text(section: _Section, sections: Mapping[str, _Section]) -> str:
    shape, (heading, *others) = section.shape, section.uses
    lines = [f"## {heading}", ""]
    if len(said := set(section.uses.values()) - {""}) == 1:
        lines += [*said, ""]
    if others:
        lines += [f"Also at {', '.join(f'`{other}`' for other in others)}.", ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    required = shape.get("required", ())
    for name, inner in shape["properties"].items():
        cells = f"`{name}`", _type(inner, sections), _default(inner, name in required), inner.get("description", "")
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    rules = dict.fromkeys(rule["message"] for rule in shape.get("x-kubernetes-validations", ()))
    if rules:
        lines += ["", "Rules:", "", *(f"- {message}" for message in rules)]
    return "\n".join([*lines, ""])


def _type(shape: Schema, sections: Mapping[str, _Section]) -> str:
    return ", ".join([_kind(shape, sections), *_bounds(shape)])


def _kind(shape: Schema, sections: Mapping[str, _Section]) -> str:
    if "enum" in shape:
        return ", ".join(f"`{word}`" for word in shape["enum"])
    if shape.get("properties"):
        return f"[object](#{_anchor(sections[_key(shape)].heading)})"
    values = shape.get("items") or shape.get("additionalProperties")
    if not isinstance(values, Mapping):
        return str(shape.get("type"))
    bounds = ", ".join(_bounds(values))
    return f"{'list of' if 'items' in shape else 'map to'} {_kind(values, sections)}{f' ({bounds})' if bounds else ''}"


def _bounds(shape: Schema) -> Iterator[str]:
    for what, counted in (("imum", ""), ("Length", " characters"), ("Items", " items"), ("Properties", " entries")):
        low, high = shape.get(f"min{what}"), shape.get(f"max{what}")
        found = []
        if low is not None:
            found.append(f"{'>' if shape.get('exclusiveMinimum') else '≥'} {_number(low)}")
        if high is not None:
            found.append(f"{'<' if shape.get('exclusiveMaximum') else '≤'} {_number(high)}")
        if found:
            yield ", ".join(found) + counted
    if "pattern" in shape:
        yield f"`{shape['pattern']}`"


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub generates for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower())


def _default(shape: Schema, required: bool) -> str:
    if required:
        return "**required**"
    default = shape.get("default")
    if default is None:
        return ""
    return "see its section" if "properties" in shape and _is_fields_own(default, shape) else f"`{_literal(default)}`"


def _is_fields_own(default: Any, shape: Schema) -> bool:
    """Whether an object's default consists only of its fields' own defaults."""
    fields = shape["properties"]
    return all(
        value == fields[name].get("default") or ("properties" in fields[name] and _is_fields_own(value, fields[name]))
        for name, value in default.items()
    )


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_literal(part)}" for key, part in value.items()) + "}"
    return _number(value) if isinstance(value, float) else str(value) or '""'


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
