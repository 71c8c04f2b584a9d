"""Whose identity the operator shows to whom: its own process, real servers, and a Secret that means no good."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.recorder import NO_SUCH_KEY, recording, saying

# The operator's reads, in a process of its own: what obstore finds in the environment is the process's.
READS = """
import asyncio, base64, json, sys
from dagger_operator.api import load
from dagger_operator.cluster.stores import Stores
from dagger_operator.store.objects import StoreUnavailable

storage, secret = json.load(sys.stdin)

class Secrets:
    async def get(self, *place):
        return {"metadata": {"resourceVersion": "1"}, "data": {k: base64.b64encode(v.encode()).decode() for k, v in secret.items()}}

source = {"source": {"type": "JSONL", "uri": "t"}}
spec = {"student": {"model": "m"}, "teacher": {"model": "t", "endpoint": {"url": "https://t/v1"}},
        "tasks": {**source, "heldOut": source}, "storage": storage}
run = load({"metadata": {"name": "demo", "namespace": "lab", "uid": "1"}, "spec": spec})

async def main():
    stores = Stores(Secrets())
    try:
        results, _ = await stores.read(run)
        print(f"read {len(results.records)} results", flush=True)
    except StoreUnavailable as error:
        print(error, flush=True)
    await stores.close()

asyncio.run(main())
"""


PLUGIN = """
import json, os
status = {"token": "token-of-" + os.environ.get("AWS_ACCESS_KEY_ID", "nobody")}
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}))
"""

# How the operator logs in; then what is left for who looks into the process's own environment, as obstore does.
LOGS_IN = """
import asyncio, ctypes
from dagger_operator.kube.connection import authorization, configuration
from dagger_operator.store.credentials import own_identity

own_identity()

async def main():
    print((await authorization(await configuration()))["Authorization"])

asyncio.run(main())
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print((getenv(b"AWS_ACCESS_KEY_ID") or b"none").decode())
"""


def operator_reads(storage: dict[str, Any], secret: dict[str, str] | None = None, **environ: str) -> str:
    """What the operator, which is what `environ` says, finds or complains of in a run's storage."""
    if secret is not None:
        storage = {**storage, "secretRef": {"name": "keys"}}
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_", "AZURE_"))}
    done = subprocess.run(
        [sys.executable, "-c", READS],
        input=json.dumps([storage, secret]),
        env={**bare, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text("the operator's own")
    return str(path)


NOBODY = "Secret keys in namespace lab (spec.storage.secretRef) has no whole key for"


@pytest.mark.parametrize(
    "secret", [{"AWS_REGION": "x@{server}/"}, {"AWS_REGION": "x@{server}/", "AWS_ROLE_ARN": "arn:aws:iam::2:role/theirs"}]
)
def test_a_secret_without_a_key_does_not_borrow_the_operators_on_aws(secret: dict[str, str], token: str) -> None:
    with recording(saying(403)) as server:
        theirs = {name: value.format(server=f"127.0.0.1:{server.port}") for name, value in secret.items()}
        mine = {"AWS_WEB_IDENTITY_TOKEN_FILE": token, "AWS_ROLE_ARN": "arn:aws:iam::1:role/operator"}
        said = operator_reads({"url": "s3://bucket/run"}, theirs, **mine)
    assert not server.callers and NOBODY in said


def test_a_secret_without_a_key_does_not_borrow_the_operators_on_google_cloud() -> None:
    own = json.dumps({"access_token": "the operator's own", "expires_in": 3600, "token_type": "Bearer"}).encode()
    with recording(saying(200, own)) as metadata, recording(saying(403)) as server:
        mine = dict.fromkeys(("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"), f"127.0.0.1:{metadata.port}")
        said = operator_reads({"url": "gs://bucket/run"}, {"GOOGLE_BASE_URL": f"https://127.0.0.1:{server.port}"}, **mine)
    assert not metadata.callers and not server.callers and NOBODY in said


def test_a_secret_without_a_key_does_not_borrow_the_operators_on_azure(token: str) -> None:
    with recording(saying(403)) as server:
        mine = {"AZURE_FEDERATED_TOKEN_FILE": token, "AZURE_CLIENT_ID": "operator", "AZURE_TENANT_ID": "ours"}
        theirs = {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_AUTHORITY_HOST": f"https://127.0.0.1:{server.port}"}
        said = operator_reads({"url": "az://container/run"}, theirs, **mine)
    assert not server.callers and NOBODY in said


def test_a_region_that_is_none_is_refused_before_anybody_is_asked(token: str) -> None:
    with recording(saying(403)) as server:
        theirs = {"AWS_ACCESS_KEY_ID": "theirs", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": f"x@127.0.0.1:{server.port}/"}
        said = operator_reads({"url": "s3://bucket/run"}, theirs)
    assert not server.callers and "Secret keys in namespace lab (spec.storage.secretRef), key AWS_REGION" in said


def test_a_secrets_keys_are_used_as_they_are_whatever_the_operator_is(token: str) -> None:
    with recording(saying(404, NO_SUCH_KEY)) as theirs, recording(saying(404, NO_SUCH_KEY)) as mine:
        own = {
            "AWS_ACCESS_KEY_ID": "mine",
            "AWS_SECRET_ACCESS_KEY": "own",
            "AWS_SESSION_TOKEN": "own",
            "AWS_ENDPOINT_URL_S3": mine.url,
            "AWS_WEB_IDENTITY_TOKEN_FILE": token,
            "AWS_REGION": "eu-own-1",
        }
        secret = {"AWS_ACCESS_KEY_ID": "tenant", "AWS_SECRET_ACCESS_KEY": "s"}
        said = operator_reads({"url": "s3://bucket/run", "endpointUrl": theirs.url}, secret, **own)
    assert said == "read 0 results\n" and not mine.callers
    path, headers = theirs.asked[0]
    shown = path + " ".join(headers.values())
    assert path.startswith("/bucket/run/run.json") and "tenant" in shown and "us-east-1" in shown
    assert "mine" not in shown and "oken" not in shown + " ".join(headers)


def test_without_a_secret_the_operator_is_itself() -> None:
    with recording(saying(404, NO_SUCH_KEY)) as server:
        own = {"AWS_ACCESS_KEY_ID": "operator", "AWS_SECRET_ACCESS_KEY": "own", "AWS_ENDPOINT_URL": server.url}
        assert operator_reads({"url": "s3://bucket/run"}, **own) == "read 0 results\n"
    path, headers = server.asked[0]
    assert path == "/bucket/run/run.json" and "Credential=operator/" in headers["authorization"]


def test_a_server_that_a_run_names_without_a_secret_gets_signatures_and_no_secret() -> None:
    with recording(saying(404, NO_SUCH_KEY)) as server:
        own = {"AWS_ACCESS_KEY_ID": "operator", "AWS_SECRET_ACCESS_KEY": "kept-to-itself"}
        assert operator_reads({"url": "s3://bucket/run", "endpointUrl": server.url}, **own) == "read 0 results\n"
    path, headers = server.asked[0]
    assert "X-Amz-Credential=operator" in path and "kept-to-itself" not in path + " ".join(headers.values())


def test_the_plugin_of_a_kubeconfig_is_who_the_operator_is_and_obstore_is_not(tmp_path: Path) -> None:
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": ["-c", PLUGIN],
        "interactiveMode": "Never",
    }
    kubeconfig = {
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "a", "user": {"exec": plugin}}],
    }
    (tmp_path / "config").write_text(json.dumps(kubeconfig))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("KUBERNETES_")}
    environ = {**bare, "KUBECONFIG": str(tmp_path / "config"), "AWS_ACCESS_KEY_ID": "operator"}
    done = subprocess.run([sys.executable, "-c", LOGS_IN], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "Bearer token-of-operator\nnone\n", done.stderr


def test_authorities_of_the_operator_that_cannot_be_read_are_named() -> None:
    secret = {"AWS_ACCESS_KEY_ID": "tenant", "AWS_SECRET_ACCESS_KEY": "s"}
    said = operator_reads({"url": "s3://bucket/run", "endpointUrl": "https://s3.example"}, secret, AWS_CA_BUNDLE="/not/there.pem")
    assert "AWS_CA_BUNDLE '/not/there.pem' of this process (the operator, daggerctl or a stage) cannot be read: No such file" in said
