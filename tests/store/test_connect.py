"""From a URL and an environment to the right client, for every cloud; nothing here touches a network."""

import json
import re
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store, from_url

from dagger_operator.api import Storage
from dagger_operator.store import connect
from dagger_operator.store.connect import Connection, connection
from dagger_operator.store.credentials import Keys, OwnIdentity
from dagger_operator.store.objects import Store, StoreUnavailable

_AMBIENT = {"AWS_PROFILE": "work", "AWS_PAGER": "", "GOOGLE_CLOUD_PROJECT": "p", "AZURE_CONFIG_DIR": "/x", "HOME": "/root"}


def _backend(connection: Connection) -> S3Store | GCSStore | AzureStore | LocalStore:
    return from_url(connection.url, config=connection.config, client_options=connection.client)


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_s3_with_keys_and_an_endpoint_of_ones_own(scheme: str) -> None:
    storage = Storage(url=f"{scheme}://bucket/runs/one", endpoint_url="http://minio:9000", region="eu-west-1")
    environ = {**_AMBIENT, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": "https://elsewhere"}
    backend = _backend(connection(storage, OwnIdentity(environ)))
    assert isinstance(backend, S3Store) and backend.prefix == "runs/one"
    assert backend.config == {
        "bucket": "bucket", "access_key_id": "id", "secret_access_key": "secret", "endpoint": "http://minio:9000", "region": "eu-west-1",
    }  # fmt: skip
    assert backend.client_options is not None and backend.client_options["allow_http"] == "true"


def test_s3_by_workload_identity() -> None:
    environ = {**_AMBIENT, "AWS_ROLE_ARN": "arn:aws:iam::1:role/r", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token", "AWS_REGION": "us-east-2"}
    backend = _backend(connection(Storage(url="s3://bucket/run"), OwnIdentity(environ)))
    assert backend.config["role_arn"] == "arn:aws:iam::1:role/r" and backend.config["web_identity_token_file"] == "/var/token"
    assert "allow_http" not in (backend.client_options or {})


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bucket/run", "AWS_ENDPOINT_URL"),
        ("az://container/run", "AZURE_STORAGE_ENDPOINT"),
        ("abfss://container@account.dfs.core.windows.net/run", "AZURE_ENDPOINT"),
        ("gs://bucket/run", "GOOGLE_BASE_URL"),
    ],
)
def test_plain_http_is_only_for_endpoints_that_say_so(url: str, name: str) -> None:
    for environ in ({}, {name: "https://server.example"}, {f"{name}_STS": "http://server.example"}):
        assert "allow_http" not in connection(Storage(url=url), OwnIdentity(environ)).client
    assert connection(Storage(url=url), OwnIdentity({name: "http://server.example"})).client["allow_http"] is True


def test_a_ca_bundle_is_handed_to_the_client(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"certificates")
    made = connection(Storage(url="s3://bucket/run"), OwnIdentity({"AWS_CA_BUNDLE": str(tmp_path / "ca.pem")}))
    assert made.client["root_certificate"] == b"certificates"


def test_whom_the_user_trusts_counts_with_a_secrets_keys_too_and_whom_a_secret_trusts_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).write_text(name)
    keys = Keys({**KEYS, "AWS_CA_BUNDLE": str(tmp_path / "theirs")}, "Secret keys")
    monkeypatch.setattr(connect, "own_identity", lambda: OwnIdentity({}))
    assert "root_certificate" not in connection(Storage(url="s3://bucket/run"), keys).client
    monkeypatch.setattr(connect, "own_identity", lambda: OwnIdentity({"AWS_CA_BUNDLE": str(tmp_path / "mine")}))
    assert connection(Storage(url="s3://bucket/run"), keys).client["root_certificate"] == b"mine"


def test_google_cloud_storage() -> None:
    environ = {
        **_AMBIENT,
        "GOOGLE_SERVICE_ACCOUNT_KEY": '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}',
    }
    backend = _backend(connection(Storage(url="gs://bucket/runs/one"), OwnIdentity(environ)))
    assert isinstance(backend, GCSStore) and backend.prefix == "runs/one" and backend.config["bucket"] == "bucket"


@pytest.mark.parametrize(
    "url", ["az://container/runs/one", "abfs://container/runs/one", "abfss://container@account.dfs.core.windows.net/runs/one"]
)
def test_azure(url: str) -> None:
    environ = {**_AMBIENT, "AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}
    backend = _backend(connection(Storage(url=url), OwnIdentity(environ)))
    assert isinstance(backend, AzureStore) and backend.prefix == "runs/one"
    assert backend.config["account_name"] == "account" and backend.config["container_name"] == "container"


def test_a_folder_with_spaces() -> None:
    made = connection(Storage(url="file:///tmp/a%20run"), OwnIdentity(_AMBIENT))
    assert made.folder == Path("/tmp/a run") and made.config == {}


def test_credentials_are_not_in_what_is_printed() -> None:
    environ = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"}
    assert "hush" not in repr(connection(Storage(url="s3://bucket/run"), OwnIdentity(environ)))


@pytest.mark.parametrize(
    "url",
    ["s3://b", "s3://b/", "s3a://b/runs/one/", "gs://b/p%20x/~q", "az://c/runs/one", "abfss://c@account.dfs.core.windows.net/runs/one"],
)
def test_a_client_of_the_bucket_reaches_the_same_keys(url: str) -> None:
    environ = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0", "AWS_REGION": "us-east-1"}
    environ |= {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'}
    to = connection(Storage(url=url), OwnIdentity(environ))
    own, shared = _backend(to), _backend(replace(to, url=to.bucket))
    assert to.prefix == (f"{own.prefix}/" if own.prefix else "")
    assert shared.config == own.config and not shared.prefix


KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
PEM = "-----BEGIN PRIVATE KEY-----\nTm90IGEg\nc2VjcmV0\n-----END PRIVATE KEY-----\n"


def _account(private_key: str) -> str:
    return json.dumps({"client_email": "a@b", "private_key": private_key, "private_key_id": "1"})


SERVICE_ACCOUNT = _account(PEM)


def _of_secret(url: str, **values: str) -> dict[str, str]:
    return connection(Storage(url=url), Keys(values, "Secret keys")).config


@pytest.mark.parametrize(
    ("url", "values"),
    [
        (
            "s3://b/r",
            {**KEYS, "AWS_SESSION_TOKEN": "t", "AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "https://s3.example:9000/sub"},
        ),
        ("s3://b/r", {name.lower(): value for name, value in KEYS.items()}),
        ("gs://b/r", {"GOOGLE_SERVICE_ACCOUNT_KEY": SERVICE_ACCOUNT}),
        ("az://c/r", {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0"}),
        ("abfss://c@account.dfs.core.windows.net/r", {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=2"}),
        ("az://c/r", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_CLIENT_ID": "i", "AZURE_CLIENT_SECRET": "s", "AZURE_TENANT_ID": "t"}),
    ],
)
def test_a_secret_with_a_whole_key_is_taken_as_it_is(url: str, values: dict[str, str]) -> None:
    assert _of_secret(url, **values, HF_TOKEN="for somebody else") == {name.lower(): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("url", "values", "said"),
    [
        ("s3://b/r", {}, "needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and has no keys"),
        ("s3://b/r", {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": ""}, "AWS_SECRET_ACCESS_KEY, and has AWS_ACCESS_KEY_ID"),
        ("s3://b/r", {"AWS_ROLE_ARN": "arn", "AWS_WEB_IDENTITY_TOKEN_FILE": "/token"}, "has AWS_ROLE_ARN, AWS_WEB_IDENTITY_TOKEN_FILE"),
        ("s3://b/r", {"AWS_SKIP_SIGNATURE": "true"}, "no whole key for s3://"),
        ("gs://b/r", {"GOOGLE_BASE_URL": "https://mine.example"}, "needs GOOGLE_SERVICE_ACCOUNT_KEY, and has GOOGLE_BASE_URL"),
        ("gs://b/r", {"GOOGLE_APPLICATION_CREDENTIALS": "/var/run/key.json"}, "needs GOOGLE_SERVICE_ACCOUNT_KEY"),
        (
            "az://c/r",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_AUTHORITY_HOST": "https://mine.example"},
            "needs AZURE_STORAGE_ACCOUNT_KEY",
        ),
        ("az://c/r", {"AZURE_CLIENT_ID": "i", "AZURE_TENANT_ID": "t"}, "AZURE_CLIENT_ID with AZURE_CLIENT_SECRET and AZURE_TENANT_ID"),
    ],
)
def test_a_secret_without_a_whole_key_is_refused_with_what_it_needs(url: str, values: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match="Secret keys has no whole key") as refused:
        _of_secret(url, **values)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("url", "values", "key"),
    [
        ("s3://b/r", {**KEYS, "AWS_REGION": "x@mine.example/"}, "AWS_REGION"),
        ("s3://b/r", {**KEYS, "AWS_DEFAULT_REGION": "x.mine.example"}, "AWS_DEFAULT_REGION"),
        ("s3://b/r", {**KEYS, "AWS_ENDPOINT_URL": "https://s3.example?x="}, "AWS_ENDPOINT_URL"),
        ("s3://b/r", {**KEYS, "AWS_ENDPOINT_URL": "http://minio..svc:9000"}, "AWS_ENDPOINT_URL"),
        ("az://c/r", {"AZURE_STORAGE_ACCOUNT_NAME": "mine.example/", "AZURE_STORAGE_ACCOUNT_KEY": "a"}, "AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://c/r", {"AZURE_STORAGE_ENDPOINT": "https://mine.example", "AZURE_STORAGE_SAS_TOKEN": "sig=2"}, "AZURE_STORAGE_ENDPOINT"),
        ("gs://b/r", {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"gcs_base_url": "https://mine.example"}'}, "GOOGLE_SERVICE_ACCOUNT_KEY"),
        ("gs://b/r", {"GOOGLE_SERVICE_ACCOUNT_KEY": "not-json-and-secret"}, "GOOGLE_SERVICE_ACCOUNT_KEY"),
    ],
)
def test_a_key_that_leads_elsewhere_is_named_and_not_shown(url: str, values: dict[str, str], key: str) -> None:
    with pytest.raises(ValueError, match=key) as refused:
        _of_secret(url, **values)
    assert "Secret keys" in str(refused.value) and values[key] not in str(refused.value)


@pytest.mark.parametrize("breaks", ["", " ", "\\n", "\n  "])
def test_a_google_key_whose_line_breaks_got_lost_is_named_with_the_remedy_and_no_byte_of_it_is_shown(breaks: str) -> None:
    account = _account(PEM.replace("\n", breaks))
    storage = Storage(url="gs://b/r")
    with pytest.raises(StoreUnavailable) as refused:
        Store.open(storage, Keys({"GOOGLE_SERVICE_ACCOUNT_KEY": account}, "Secret keys"))
    named = "Secret keys, key GOOGLE_SERVICE_ACCOUNT_KEY has a private_key that is no PEM with its line breaks: write the file that `gcloud"
    assert named in str(refused.value)
    with pytest.raises(StoreUnavailable) as own:
        Store.open(storage, OwnIdentity({"GOOGLE_SERVICE_ACCOUNT_KEY": account}))
    for error in (refused.value, own.value):
        assert not re.search(r"\d+, \d+, \d+", "".join(traceback.format_exception(error)))


def test_a_google_key_may_have_the_line_breaks_of_windows_and_lack_the_last_one() -> None:
    for private_key in (PEM.replace("\n", "\r\n"), PEM.strip(), PEM.replace("PRIVATE", "RSA PRIVATE")):
        assert _of_secret("gs://b/r", GOOGLE_SERVICE_ACCOUNT_KEY=_account(private_key))


def test_a_secret_hands_out_nothing_of_the_processs_own() -> None:
    mine = {**KEYS, "AWS_ENDPOINT_URL": "https://s3.example"}
    theirs = (
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_ENDPOINT_URL_STS",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_CA_BUNDLE",
        "aws_metadata_endpoint",
    )
    assert _of_secret("s3://b/r", **mine, **dict.fromkeys(theirs, "/var/run/secrets/token")).keys() == {name.lower() for name in mine}


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://minio:9000",
        "http://my_minio.svc.local.:9000",
        "https://10.0.0.1/sub",
        "http://[fd00::1]:9000",
        f"https://{'a' * 63}",
    ],
)
def test_an_endpoint_that_can_be_one_is_taken(endpoint: str) -> None:
    assert Storage(url="s3://b/r", endpoint_url=endpoint).endpoint_url == endpoint


def test_a_server_that_the_run_or_its_secret_names_is_known_as_such() -> None:
    named, plain = Storage(url="s3://b/r", endpoint_url="http://s3.example"), Storage(url="s3://b/r")
    own = OwnIdentity({"AWS_ENDPOINT_URL": "https://s3.example"})
    assert connection(named, own).named_server and connection(named, Keys(KEYS, "Secret keys")).named_server
    assert connection(plain, Keys({**KEYS, "AWS_ENDPOINT_URL": "https://s3.example"}, "Secret keys")).named_server
    assert not connection(plain, own).named_server and not connection(plain, Keys(KEYS, "Secret keys")).named_server
