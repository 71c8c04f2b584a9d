"""Converts a run's `storage` and credentials to obstore's configuration, without network access.

obstore rejects variables that it does not know (`AWS_PROFILE`, `GOOGLE_CLOUD_PROJECT`), so only known ones are passed on.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dagger_operator.api import Storage
from dagger_operator.store.credentials import ENDPOINTS, Credentials, Keys, own_identity

_AWS = """access_key_id secret_access_key session_token token region default_region endpoint endpoint_url endpoint_url_s3 endpoint_url_sts
    role_arn role_session_name web_identity_token_file container_credentials_relative_uri container_credentials_full_uri
    container_authorization_token_file metadata_endpoint imdsv1_fallback skip_signature unsigned_payload request_payer s3_express
    virtual_hosted_style_request checksum_algorithm disable_tagging conditional_put disable_bulk_delete server_side_encryption
    sse_kms_key_id sse_bucket_key_enabled sse_customer_key_base64"""
_GOOGLE = "service_account service_account_path service_account_key application_credentials skip_signature base_url bearer_token"
_AZURE = """storage_account_name storage_account_key storage_access_key storage_master_key storage_client_id storage_client_secret
    storage_tenant_id storage_authority_id storage_sas_key storage_sas_token storage_token storage_endpoint storage_use_emulator
    storage_authority_host storage_encryption_key client_id client_secret tenant_id authority_id authority_host federated_token_file
    endpoint msi_endpoint identity_endpoint object_id msi_resource_id use_azure_cli credential_type use_fabric_endpoint
    fabric_token_service_url fabric_workload_host fabric_session_token fabric_cluster_identifier skip_signature disable_tagging"""


def _names(prefix: str, names: str) -> frozenset[str]:
    return frozenset(f"{prefix}_{name}" for name in names.split())


_KNOWN = {
    "s3": _names("aws", _AWS),
    "gs": _names("google", _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss"), _names("azure", _AZURE)),
}


@dataclass(frozen=True)
class Connection:
    """Arguments of `obstore.store.from_url`: `bucket`, or `url` if that is a folder."""

    url: str
    scheme: str
    """`file`, `s3`, `gs`, `az`, `abfs` or `abfss`."""
    folder: Path | None = None
    """The folder behind a `file` URL."""
    config: dict[str, str] = field(default_factory=dict, repr=False)
    """Contains credentials: never printed."""
    client: dict[str, Any] = field(default_factory=dict, repr=False)
    retry: dict[str, Any] = field(default_factory=dict)
    named_server: bool = False
    """Whether the run or its Secret names the server, which may then be anyone's; otherwise the cloud or this process chose it."""

    @property
    def bucket(self) -> str:
        return f"{self.scheme}://{urlsplit(self.url).netloc}"

    @property
    def prefix(self) -> str:
        """Common prefix of all keys, ending with a slash; empty if the run has the whole bucket."""
        path = unquote(urlsplit(self.url).path).removeprefix("/").removesuffix("/")
        return f"{path}/" if path else ""


def connection(storage: Storage, credentials: Credentials) -> Connection:
    """Return the connection for a run's storage. Reads a CA bundle if this process's environment names one (`AWS_CA_BUNDLE`), whoever's
    keys it uses: a Secret cannot name a local file.

    Raises ValueError if the bundle cannot be read, and for invalid keys.
    """
    url = storage.url.replace("s3a://", "s3://", 1)
    scheme = url.split("://", 1)[0]
    if scheme == "file":
        return Connection(url, scheme, folder=Path(unquote(urlsplit(url).path)))
    # Some seconds in all, so that a wrong address is soon told; a stage that gives up is retried, for as long as a server takes to restart.
    backoff = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=10), "base": 2}
    retry = {"max_retries": 9, "retry_timeout": timedelta(seconds=90), "backoff": backoff}
    # One request transfers at most one part of a large object. Large bodies are limited by inactivity, not by their total duration.
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=60),
        "timeout": timedelta(minutes=15),
    }
    if isinstance(credentials, Keys):
        config = credentials.config(scheme)
        named_server = bool(config.keys() & ENDPOINTS)
        environ = own_identity().environ
    else:
        config = {key.lower(): value for key, value in credentials.environ.items() if key.lower() in _KNOWN[scheme] and value}
        named_server = False
        environ = credentials.environ
    if scheme == "s3":
        if bundle := environ.get("AWS_CA_BUNDLE"):
            client["root_certificate"] = _certificates(bundle)
        if storage.endpoint_url:
            for name in ("aws_endpoint_url", "aws_endpoint_url_s3"):
                config.pop(name, None)
            config["aws_endpoint"] = storage.endpoint_url
            named_server = True
        if storage.region:
            config["aws_region"] = storage.region
    endpoints = [value for name, value in config.items() if name in ENDPOINTS]
    if endpoints and all(endpoint.startswith("http://") for endpoint in endpoints):
        client["allow_http"] = True
    return Connection(url, scheme, config=config, client=client, retry=retry, named_server=named_server)


def _certificates(bundle: str) -> bytes:
    try:
        return Path(bundle).read_bytes()
    except OSError as error:
        raise ValueError(
            f"AWS_CA_BUNDLE {bundle!r} of this process (the operator, daggerctl or a stage) cannot be read: {error.strerror}: name a file "
            "of certificates"
        ) from None
