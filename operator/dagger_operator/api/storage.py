"""The object storage through which stages exchange all data."""

from typing import Annotated

from pydantic import Field

from dagger_operator.api.model import ApiModel
from dagger_operator.api.pods import ObjectName

# Storage clients build host names from regions, and append a bucket's path to an endpoint.
REGION_PATTERN = r"^[A-Za-z0-9_-]+$"
_LABEL = r"[A-Za-z0-9_-]{1,63}"  # no resolver accepts an empty or a longer label
ENDPOINT_PATTERN = rf"^https?://({_LABEL}(\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+\])(:[0-9]{{1,5}})?(/[^\s?#@]*)?$"


class SecretRef(ApiModel):
    """A Secret whose keys become environment variables of the storage client, such as AWS_ACCESS_KEY_ID."""

    name: ObjectName
    """Name of the Secret, in the run's namespace."""


class Storage(ApiModel):
    """Storage prefix of the run: a second run on the same prefix is refused."""

    url: Annotated[str, Field(pattern=r"^(s3|s3a|gs|az|abfs|abfss|file)://[^\s]*$", max_length=2048)]
    """`s3://bucket/prefix`, `gs://`, `az://` or `file:///folder`. It must support conditional writes (`daggerctl store check`)."""
    secret_ref: SecretRef | None = None
    """Credentials as environment variables of the storage client, with all parts of a key; defaults to the workload's own identity."""
    endpoint_url: Annotated[str, Field(pattern=ENDPOINT_PATTERN, max_length=2048)] | None = None
    """S3-compatible server other than the cloud's own, without a user, a query or a fragment; parts of its name have 1 to 63 characters."""
    region: Annotated[str, Field(pattern=REGION_PATTERN, max_length=64)] | None = None
    """Region of the bucket, such as eu-west-1, if the client cannot find it out: letters, digits, `-` and `_`."""
