"""From a URL and an environment to the right client, for every cloud; nothing here touches a network."""

from dataclasses import replace
from pathlib import Path

import pytest
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from dagger_operator.api import Storage
from dagger_operator.store.connect import Connection, connection

_AMBIENT = {"AWS_PROFILE": "work", "AWS_PAGER": "", "GOOGLE_CLOUD_PROJECT": "p", "AZURE_CONFIG_DIR": "/x", "HOME": "/root"}


def _backend(connection: Connection) -> S3Store | GCSStore | AzureStore | LocalStore:
    return from_url(connection.url, config=connection.config, client_options=connection.client)


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_s3_with_keys_and_an_endpoint_of_ones_own(scheme: str) -> None:
    storage = Storage(url=f"{scheme}://bucket/runs/one", endpoint_url="http://minio:9000", region="eu-west-1")
    environ = {**_AMBIENT, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "https://elsewhere"}
    backend = _backend(connection(storage, environ))
    assert isinstance(backend, S3Store) and backend.prefix == "runs/one"
    assert backend.config == {
        "bucket": "bucket", "access_key_id": "id", "secret_access_key": "secret", "endpoint": "http://minio:9000", "region": "eu-west-1",
    }  # fmt: skip
    assert backend.client_options is not None and backend.client_options["allow_http"] == "true"


def test_s3_by_workload_identity() -> None:
    environ = {**_AMBIENT, "AWS_ROLE_ARN": "arn:aws:iam::1:role/r", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token", "AWS_REGION": "us-east-2"}
    backend = _backend(connection(Storage(url="s3://bucket/run"), environ))
    assert backend.config["role_arn"] == "arn:aws:iam::1:role/r" and backend.config["web_identity_token_file"] == "/var/token"
    assert "allow_http" not in (backend.client_options or {})


def test_plain_http_is_only_for_endpoints_that_say_so() -> None:
    environ = {"AWS_ENDPOINT_URL": "https://s3.example", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert "allow_http" not in connection(Storage(url="s3://bucket/run"), environ).client
    assert connection(Storage(url="s3://bucket/run"), {**environ, "AWS_ENDPOINT_URL": "http://s3.example"}).client["allow_http"] is True


def test_a_ca_bundle_is_handed_to_the_client(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"certificates")
    made = connection(Storage(url="s3://bucket/run"), {"AWS_CA_BUNDLE": str(tmp_path / "ca.pem")})
    assert made.client["root_certificate"] == b"certificates"


def test_google_cloud_storage() -> None:
    environ = {
        **_AMBIENT,
        "GOOGLE_SERVICE_ACCOUNT_KEY": '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}',
    }
    backend = _backend(connection(Storage(url="gs://bucket/runs/one"), environ))
    assert isinstance(backend, GCSStore) and backend.prefix == "runs/one" and backend.config["bucket"] == "bucket"


@pytest.mark.parametrize(
    "url", ["az://container/runs/one", "abfs://container/runs/one", "abfss://container@account.dfs.core.windows.net/runs/one"]
)
def test_azure(url: str) -> None:
    environ = {**_AMBIENT, "AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}
    backend = _backend(connection(Storage(url=url), environ))
    assert isinstance(backend, AzureStore) and backend.prefix == "runs/one"
    assert backend.config["account_name"] == "account" and backend.config["container_name"] == "container"


def test_a_folder_with_spaces() -> None:
    made = connection(Storage(url="file:///tmp/a%20run"), _AMBIENT)
    assert made.folder == Path("/tmp/a run") and made.config == {}


def test_credentials_are_not_in_what_is_printed() -> None:
    environ = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"}
    assert "hush" not in repr(connection(Storage(url="s3://bucket/run"), environ))


@pytest.mark.parametrize(
    "url",
    ["s3://b", "s3://b/", "s3a://b/runs/one/", "gs://b/p%20x/~q", "az://c/runs/one", "abfss://c@account.dfs.core.windows.net/runs/one"],
)
def test_a_client_of_the_bucket_reaches_the_same_keys(url: str) -> None:
    environ = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0", "AWS_REGION": "us-east-1"}
    environ |= {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'}
    to = connection(Storage(url=url), environ)
    own, shared = _backend(to), _backend(replace(to, url=to.bucket))
    assert to.prefix == (f"{own.prefix}/" if own.prefix else "")
    assert shared.config == own.config and not shared.prefix
