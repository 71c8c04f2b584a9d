"""Bad input, reported so that a reader can fix it: the field's path, the value found, and what to write instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dagger_operator.api.model import Misfit


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a resource."""

    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value}: {self.remedy}"


class InvalidRun(ValueError):
    """A document that is not a valid `DAggerRun`; `problems` lists everything wrong with it, not only the first problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidRun:
    """Turn pydantic's errors into problems with remedies."""
    return InvalidRun([_problem(detail, model) for detail in error.errors(include_url=False)])


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or "(document)"


def _value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the names that are valid where an unknown field was found."""
    parent = _field_at(model, location[:-1])
    current = _model_in(parent.annotation) if parent else model if len(location) == 1 else None
    return [f.alias or to_camel(name) for name, f in current.model_fields.items()] if current else []


def _field_at(model: type[BaseModel], location: Sequence[int | str]) -> FieldInfo | None:
    """Return the field that a location names; an item of a list counts as the list."""
    current: type[BaseModel] | None = model
    found = None
    for part in location:
        if isinstance(part, int):
            continue
        found = next((f for n, f in current.model_fields.items() if part in (n, f.alias, to_camel(n))), None) if current else None
        current = _model_in(found.annotation) if found else None
    return found


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> Problem:
    location, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    field, value = _path(location), f"got {_value(detail['input'])}"
    match kind:
        case "extra_forbidden":
            known = _fields_at(model, location)
            close = get_close_matches(str(location[-1]), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known) or 'nothing'}"
            return Problem(field, "unknown field", remedy)
        case "missing":
            return Problem(field, "missing", "this field is required")
        case "value_error":
            error = context.get("error")
            if isinstance(error, Misfit):
                found = "missing" if error.value is None else f"got {_value(error.value)}"
                return Problem(_path((*location, *([error.field] if error.field else []))), found, error.remedy)
            return Problem(field, value, str(error or detail["msg"]))
        case "enum" | "literal_error":
            return Problem(field, value, f"write one of {context.get('expected')}")
        case "string_pattern_mismatch":
            described = _field_at(model, location)
            remedy = f"write {described.description}" if described and described.description else detail["msg"]
            return Problem(field, value, f"does not match {context.get('pattern')}; {remedy}")
        case _:
            return Problem(field, value, _as_a_remedy(detail["msg"]))


def _as_a_remedy(message: str) -> str:
    for said, remedy in (("Input should be a", "write a"), ("Input should be", "write a value"), ("should have", "may have")):
        message = message.replace(said, remedy)
    return message[0].lower() + message[1:]
