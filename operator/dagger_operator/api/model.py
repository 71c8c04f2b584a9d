"""The base of every API model: camelCase on the wire, unknown fields refused, docstrings as field documentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, to_jsonable_python


@dataclass(frozen=True)
class Rule:
    """A CEL rule for the API server (`x-kubernetes-validations`); the model's own validator checks the same in Python."""

    rule: str
    message: str

    def schema(self) -> dict[str, str]:
        return {"rule": self.rule, "message": self.message}


class Misfit(ValueError):
    """Fields that are valid one by one but not together: which one to change, its value, and what to write instead."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(remedy)


def list_map(key: str) -> dict[str, Any]:
    """Return the schema of a list whose items are identified by a key, so that several writers can own items of it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def refuse_repeated(field: str, keys: Sequence[object]) -> None:
    """Raise `Misfit` for a repeated key, as the API server refuses it in a list map."""
    for key in keys:
        if keys.count(key) > 1:
            raise Misfit(field, key, "is there twice: keep one of them")


class ApiModel(BaseModel):
    """Immutable, strict about names, documented by the docstring below each field."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    cel: ClassVar[tuple[Rule, ...]] = ()
    """CEL rules that the generated CRD carries at this model's level."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Add what pydantic leaves out: CEL rules, and defaults in JSON form, including those of factories."""
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        if cls.cel:
            own["x-kubernetes-validations"] = [rule.schema() for rule in cls.cel]
        for field in cls.model_fields.values():
            shape = own["properties"][field.alias or ""]
            shape.pop("default", None)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if default is not None:
                shape["default"] = _json(default)
        return schema

    def wire(self) -> dict[str, Any]:
        """Return the JSON form: camelCase, enums as strings, unset optional fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _json(default: Any) -> Any:
    """Return a default as the API server should fill it in: `{}` where the fields' own defaults supply the rest.

    With CEL rules the default is written out: an API server checks a default against them as it stands, before it fills in nested defaults.
    """
    if not isinstance(default, ApiModel):
        return to_jsonable_python(default)
    if not default.cel and all(not field.is_required() for field in type(default).model_fields.values()) and default == type(default)():
        return {}
    return default.wire()
