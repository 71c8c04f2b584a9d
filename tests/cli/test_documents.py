"""A file is one DAggerRun and the Secrets that it names."""

from pathlib import Path
from typing import Any

import yaml

from dagger_operator.cli.documents import read


def test_secrets_come_from_plain_and_from_encoded_text(tmp_path: Path, document: dict[str, Any]) -> None:
    secret = {"kind": "Secret", "metadata": {"name": "key"}, "data": {"a": "b25l"}, "stringData": {"b": "two"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump_all([document, secret]))
    assert read(path).secrets == {"key": {"a": "one", "b": "two"}}


def test_secrets_do_not_show_when_documents_are_printed(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump_all([document, {"kind": "Secret", "metadata": {"name": "key"}, "stringData": {"b": "s3cret"}}]))
    assert "s3cret" not in repr(read(path))
