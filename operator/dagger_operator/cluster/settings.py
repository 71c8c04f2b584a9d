"""The operator's own settings: environment variables `DAGGER_OPERATOR_*`, read once."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Json, ValidationError

from dagger_operator.api.pods import ObjectName
from dagger_operator.control import PROMETHEUS

PREFIX = "DAGGER_OPERATOR_"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Image = Annotated[str, Field(min_length=1, max_length=512)]
PeerField = Annotated[str, Field(pattern=r"^(namespaceSelector|podSelector|ipBlock)$")]
Peer = Annotated[dict[PeerField, dict[str, Any]], Field(min_length=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class InvalidSettings(ValueError):
    """A variable with an invalid value; the message names variable, value and remedy."""


def _listed(value: Any) -> Any:
    return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else value


class Settings(BaseModel):
    """Settings, as the chart sets them. An empty variable counts as not set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespaces: Annotated[tuple[Name, ...], BeforeValidator(_listed)] = ()
    """Namespaces whose runs are managed, comma-separated; empty means all."""
    namespace: Name = "default"
    """The operator's own namespace: its Lease is kept there."""
    pod: Annotated[str, Field(min_length=1, max_length=253)] = Field(default_factory=lambda: os.uname().nodename)
    """Name of this process among its replicas: the pod's."""
    sandbox_namespace: Name | None = None
    """Namespace for sandbox pods of runs that name none."""
    helper_image: Image | None = None
    """Image with the sandboxes' helper for runs that name none."""
    sandbox_priority_class: ObjectName | None = None
    """PriorityClass of sandbox pods for runs that name none."""
    worker_image: Image | None = None
    """Image of every stage but training for runs that name none."""
    trainer_image: Image | None = None
    """Trainer image for runs that name none."""
    scrapers: Json[tuple[Peer, ...]] = PROMETHEUS
    """Peers that may scrape the servers and trainings of runs: peers of a NetworkPolicy, as a JSON list; `[]` means none."""
    metrics_port: Port = 8080
    health_port: Port = 8081
    """0 turns a server off."""
    lease: Annotated[str, Field(pattern=r"^(-|[a-z0-9]([-a-z0-9.]*[a-z0-9])?)$", max_length=253)] = "dagger-operator"
    """Name of the Lease by which replicas elect a leader; `-` means none, for a single replica."""
    workers: Annotated[int, Field(ge=1, le=256)] = 4
    """Runs reconciled at the same time, not counting those that wait for storage."""

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings. Raises `InvalidSettings`, also for an unknown variable with this prefix: a misspelt setting is not ignored."""
        given = {name.removeprefix(PREFIX).lower(): value for name, value in environ.items() if name.startswith(PREFIX) and value}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise InvalidSettings("\n".join(_explained(detail) for detail in error.errors(include_url=False))) from None


def _explained(detail: Any) -> str:
    variable = PREFIX + str(detail["loc"][0]).upper()
    if detail["type"] == "extra_forbidden":
        known = ", ".join(sorted(PREFIX + name.upper() for name in Settings.model_fields))
        return f"{variable}: no such setting: write one of {known}"
    return f"{variable}: {detail['input']!r}: {detail['msg']}"
