"""JSON from scaffolds and policies, made safe to store: objects only, no NaN, no lone surrogates."""

import json
from typing import Any, NoReturn


class InvalidWire(ValueError):
    """A body that is not a JSON object."""


def parse(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Lone surrogates, which tools that decode with `surrogateescape` produce, become U+FFFD: neither UTF-8
    nor Parquet can hold them."""
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidWire(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidWire(f"a JSON object is needed, got {type(value).__name__}")
    # Only an escape can produce a surrogate, so most bodies need no traversal.
    return {_storable(name): _storable(item) for name, item in value.items()} if b"\\u" in data else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value


def dump(value: dict[str, Any]) -> bytes:
    """Serialize a JSON object as compact UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without fields that client libraries set to null; `content` stays, which may be null beside tool calls."""
    if None not in message.values():
        return message
    return {key: value for key, value in message.items() if value is not None or key == "content"}
