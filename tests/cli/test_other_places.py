"""Runs that this machine does not keep: what a command needs of one is in the file that names it."""

from typing import Any

import pytest

from dagger_operator.api import load
from dagger_operator.cli.storing import open_store
from dagger_operator.store.credentials import Keys, own_identity
from dagger_operator.store.objects import Store


def test_its_status_is_shown_as_kubectl_told_it(ctl: Any, from_kubectl: dict[str, Any]) -> None:
    answer = ctl("status", "-", piped=[from_kubectl])
    assert answer.returncode == 0 and "small: Succeeded, round 2 of" in answer.stdout


def test_its_storage_is_verified(ctl: Any, from_kubectl: dict[str, Any]) -> None:
    answer = ctl("store", "fsck", "-", piped=[from_kubectl])
    assert answer.returncode == 1 and "nobody owns this prefix" in answer.stdout


def test_what_cannot_be_a_runs_name_is_a_file(ctl: Any) -> None:
    assert "absent.yaml: cannot be read" in ctl("store", "fsck", "absent.yaml").stderr
    assert "absent: cannot be read" in ctl("status", "./absent").stderr


@pytest.mark.parametrize(
    ("given", "used"),
    [({"keys": {"AWS_REGION": "here"}}, Keys({"AWS_REGION": "here"}, "Secret keys (spec.storage.secretRef)")), ({}, None)],
)
def test_credentials_come_from_the_secret_or_where_it_is_not_given_from_the_environment(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: Any, used: Any
) -> None:
    document["spec"]["storage"] = {"url": "s3://bucket/prefix", "secretRef": {"name": "keys"}}
    opened: list[Any] = []
    monkeypatch.setattr(Store, "open", lambda storage, credentials: opened.append(credentials))
    open_store(load(document), given)
    assert opened == [used or own_identity()]
