"""A teacher's distribution over each token of its turn, as far as its server reports it: the most likely tokens.

Servers report it in the format of the OpenAI API, and vLLM identifies tokens by id on request. A label has tokens times k of these
numbers, so they are packed rather than Python objects.
"""

import base64
import struct
from array import array
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, model_validator

_NAMED = "token_id:"
"""Prefix that vLLM puts before an id."""


def _packed(typecode: str) -> tuple[PlainValidator, PlainSerializer]:
    """Return the validator and serialiser of four-byte numbers; JSON has them as little-endian base64: fast, short, and portable."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            value = struct.unpack(f"<{len(data) // 4}{typecode}", data)
        try:
            return array(typecode, value)
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None

    def written(value: Any) -> str:
        return base64.b64encode(struct.pack(f"<{len(value)}{typecode}", *value)).decode()

    return PlainValidator(read), PlainSerializer(written, return_type=str, when_used="json")


if TYPE_CHECKING:
    Ids = array[int]
    Logprobs = array[float]
else:  # arrays can be subscripted from Python 3.12 on
    Ids = Annotated[array, *_packed("i")]
    Logprobs = Annotated[array, *_packed("f")]


class TopLogprobs(BaseModel):
    """The k most likely tokens at each token of a turn: `top_ids` and `top_logprobs` hold k for the first, then k for the second, etc."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)

    token_ids: Ids
    """The turn as the teacher's tokens, including those that end it and those that its text does not show."""
    top_ids: Ids
    top_logprobs: Logprobs
    """Natural logarithms, of the distribution before temperature and top-p; the rest of the probability belongs to all other tokens."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if len(self.top_ids) != len(self.top_logprobs) or len(self.top_ids) != self.k * len(self.token_ids):
            raise ValueError(f"{len(self.top_ids)} ids and {len(self.top_logprobs)} log-probabilities for {len(self.token_ids)} tokens")
        return self

    @property
    def k(self) -> int:
        return len(self.top_ids) // len(self.token_ids) if self.token_ids else 0

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns that Parquet stores: one list per token."""
        cuts = range(0, len(self.top_ids), self.k or 1)
        return {
            "token_ids": self.token_ids.tolist(),
            "top_ids": [self.top_ids[cut : cut + self.k].tolist() for cut in cuts],
            "top_logprobs": [self.top_logprobs[cut : cut + self.k].tolist() for cut in cuts],
        }

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any]) -> Self:
        """Inverse of `columns`. Raises `ValueError` if the lists differ in length."""
        top = {name: list(chain.from_iterable(columns[name])) for name in ("top_ids", "top_logprobs")}
        return cls(token_ids=columns["token_ids"], **top)


def asked(k: int) -> dict[str, Any]:
    """Return the request parameters that ask for k log-probabilities; empty for k = 0."""
    return {"logprobs": True, "top_logprobs": k, "return_tokens_as_token_ids": True} if k else {}


def told(choice: Mapping[str, Any], k: int) -> TopLogprobs | None:
    """Return up to k log-probabilities per token of a choice; None if some token has none, or tokens are given as text."""
    try:
        entries = choice["logprobs"]["content"]
        tops = [entry["top_logprobs"][:k] for entry in entries]
        if not tops or not (wide := min(map(len, tops))):
            return None
        listed = [one for top in tops for one in top[:wide]]
        return TopLogprobs(
            token_ids=[_id(entry) for entry in entries],
            top_ids=[_id(one) for one in listed],
            top_logprobs=[min(0.0, one["logprob"]) for one in listed],
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _id(entry: Mapping[str, Any]) -> int:
    token = entry["token"]
    if not token.startswith(_NAMED):
        raise ValueError(f"{token!r} is no token id")
    return int(token.removeprefix(_NAMED))
