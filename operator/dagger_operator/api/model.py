"""The base of every API model: camelCase on the wire, unknown fields refused, docstrings as field docs."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """A CEL rule for the API server (`x-kubernetes-validations`); the model's own validator says the same in Python."""

    rule: str
    message: str

    def schema(self) -> dict[str, str]:
        return {"rule": self.rule, "message": self.message}


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
    """Rules that the generated CRD carries at this model's level."""

    def wire(self) -> dict[str, Any]:
        """The JSON form: camelCase, enums as strings, unset optionals left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)
