"""Bad input, said so that a reader can mend it: the field's path, the value found, what to write instead."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a resource."""

    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value}: {self.remedy}"


class InvalidRun(ValueError):
    """A document that is no valid `DAggerRun`; `problems` lists everything wrong with it, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


def explain(error: ValidationError, model: type[BaseModel]) -> InvalidRun:
    """Turns pydantic's errors into problems with remedies."""
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
    """Names that would have been known where an unknown field stands."""
    current: type[BaseModel] | None = model
    for part in location[:-1]:
        if current is None or isinstance(part, int):
            return []
        found = next((f for name, f in current.model_fields.items() if part in (name, f.alias, to_camel(name))), None)
        current = _model_in(found.annotation) if found else None
    return [f.alias or to_camel(name) for name, f in current.model_fields.items()] if current else []


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
            return Problem(field, value, str(context.get("error", detail["msg"])))
        case "enum" | "literal_error":
            return Problem(field, value, f"write one of {context.get('expected')}")
        case _:
            return Problem(field, value, detail["msg"][0].lower() + detail["msg"][1:])
