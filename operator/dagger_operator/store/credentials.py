"""Credentials for opening a store: this process's own identity, or exactly the keys of a Secret."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from dagger_operator.api.storage import ENDPOINT_PATTERN, REGION_PATTERN

IDENTITY_PREFIXES = ("AWS_", "GOOGLE_", "AZURE_")
"""Prefixes of the variables that give a process its cloud identity, and that the storage client reads."""


@dataclass(frozen=True)
class OwnIdentity:
    """This process's own identity: from its environment or, if that has none, from its machine."""

    environ: Mapping[str, str] = field(repr=False)


@cache
def own_identity() -> OwnIdentity:
    """Return this process's own identity. The first call removes it from the process's environment.

    obstore adds what it finds there to whatever it is given. So a process that opens stores with others' keys must not have its own
    identity in the environment: `Store.open` calls this first. A process with threads calls it before starting any. `os.environ`,
    Python's copy, keeps it for subprocesses that Python starts, such as the plugin of a kubeconfig that gets a token from a cloud.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith(IDENTITY_PREFIXES)}
    for name in own:
        os.unsetenv(name)
    return OwnIdentity(own)


@dataclass(frozen=True)
class Keys:
    """Exactly these keys, whatever identity this process has."""

    values: Mapping[str, str] = field(repr=False)
    """By their cloud's usual names. Keys that are not for the storage client, such as HF_TOKEN, are ignored."""
    source: str
    """Where they come from, for messages: the Secret."""

    def config(self, scheme: str) -> dict[str, str]:
        """Return obstore's configuration for a cloud (`s3`, `gs`, `az`, `abfs`, `abfss`).

        Raises ValueError, which names the Secret, its keys and what it needs, but no value: without a complete key obstore would request
        the identity of the process or of its node.
        """
        cloud = _CLOUDS[scheme]
        config = {name: value for key, value in self.values.items() if value and (name := key.lower()) in cloud.names}
        if not any(all(config.keys() & aliases for aliases in key) for key in cloud.keys):
            there = ", ".join(sorted(name for name, value in self.values.items() if value)) or "no keys"
            raise ValueError(f"{self.source} has no whole key for {scheme}://: it needs {cloud.needs}, and has {there}")
        for name in config:
            for pattern, such_as, names in _PATTERNS:
                if name in names and not re.fullmatch(pattern, config[name]):
                    raise ValueError(f"{self.source}, key {name.upper()} does not do: write {such_as}")
        if account := config.get("google_service_account_key"):
            self._check_account(account)
        if cloud is _BLOB and config.keys() & ENDPOINTS and not config.keys() & _ACCOUNT_KEY:
            raise ValueError(f"{self.source} has AZURE_STORAGE_ENDPOINT: beside it goes AZURE_STORAGE_ACCOUNT_KEY and no other kind of key")
        return config

    def _check_account(self, account: str) -> None:
        where = f"{self.source}, key GOOGLE_SERVICE_ACCOUNT_KEY"
        remedy = "write the file that `gcloud iam service-accounts keys create` made, unchanged"
        try:
            told = json.loads(account)
            fields = told.keys()
        except (ValueError, AttributeError):
            raise ValueError(f"{where} is no JSON object: {remedy}") from None
        if foreign := sorted(fields & {"gcs_base_url", "disable_oauth"}):
            raise ValueError(f"{where} has the field {foreign[0]}: leave it out; only Google's own servers are asked")
        if not re.fullmatch(_PRIVATE_KEY, str(told.get("private_key"))):
            raise ValueError(f"{where} has a private_key that is no PEM with its line breaks: {remedy}")


Credentials = OwnIdentity | Keys


def _aws(names: str) -> frozenset[str]:
    return frozenset(f"aws_{name}" for name in names.split())


def _azure(names: str) -> frozenset[str]:
    return frozenset(f"azure_{name}" for name in names.split())


@dataclass(frozen=True)
class _Cloud:
    keys: tuple[tuple[frozenset[str], ...], ...]
    """What makes a complete key: one of these tuples, with one alias of each of its parts."""
    more: frozenset[str]
    """What may be given besides. Nothing that names a file, a token service, or the identity of a process."""
    needs: str

    @property
    def names(self) -> frozenset[str]:
        return self.more.union(*(aliases for key in self.keys for aliases in key))


ENDPOINTS = _aws("endpoint endpoint_url endpoint_url_s3") | _azure("storage_endpoint endpoint") | {"google_base_url"}
"""Names by which an environment sets the server; a Secret may not set Google's."""
_S3 = _Cloud(
    ((_aws("access_key_id"), _aws("secret_access_key")),),
    _aws(
        """session_token region default_region endpoint endpoint_url endpoint_url_s3 virtual_hosted_style_request s3_express
        unsigned_payload checksum_algorithm request_payer disable_tagging server_side_encryption sse_kms_key_id sse_bucket_key_enabled
        sse_customer_key_base64"""
    ),
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
)
_GCS = _Cloud(((frozenset({"google_service_account_key"}),),), frozenset(), "GOOGLE_SERVICE_ACCOUNT_KEY")
_ACCOUNT_KEY = _azure("storage_account_key storage_access_key storage_master_key")
_CLIENT = (
    _azure("client_id storage_client_id"),
    _azure("client_secret storage_client_secret"),
    _azure("tenant_id authority_id storage_tenant_id storage_authority_id"),
)
_BLOB = _Cloud(
    ((_ACCOUNT_KEY,), (_azure("storage_sas_key storage_sas_token"),), _CLIENT),
    _azure("storage_account_name storage_endpoint endpoint disable_tagging"),
    "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, or AZURE_CLIENT_ID with AZURE_CLIENT_SECRET and AZURE_TENANT_ID",
)
_CLOUDS = {"s3": _S3, "gs": _GCS, **dict.fromkeys(("az", "abfs", "abfss"), _BLOB)}

_PRIVATE_KEY = r"\s*-----BEGIN (RSA )?PRIVATE KEY-----\r?\n[A-Za-z0-9+/=\r\n]+\n-----END (RSA )?PRIVATE KEY-----\s*"

# obstore builds host names from these.
_PATTERNS = (
    (REGION_PATTERN, "a region such as eu-west-1", _aws("region default_region")),
    (ENDPOINT_PATTERN, "a URL such as https://s3.example:9000, without a user, a query, a fragment, or a name that cannot be", ENDPOINTS),
    (r"[a-z0-9-]+", "the name of a storage account", _azure("storage_account_name")),
)
