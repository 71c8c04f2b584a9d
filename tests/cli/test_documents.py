"""A file is one DAggerRun and the Secrets that it names."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.api import InvalidRun, load
from dagger_operator.cli.documents import read, written
from fixtures.tools import ROOT, built


def test_secrets_come_from_plain_and_from_encoded_text(tmp_path: Path, document: dict[str, Any]) -> None:
    secret = {"kind": "Secret", "metadata": {"name": "key"}, "data": {"a": "b25l"}, "stringData": {"b": "two"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump_all([document, secret]))
    assert read(path).secrets == {"key": {"a": "one", "b": "two"}}


def test_secrets_do_not_show_when_documents_are_printed(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump_all([document, {"kind": "Secret", "metadata": {"name": "key"}, "stringData": {"b": "s3cret"}}]))
    assert "s3cret" not in repr(read(path))


def _with_rate(document: dict[str, Any], rate: str) -> str:
    document["spec"]["training"] = {"learningRate": "RATE"}
    return yaml.safe_dump(document).replace("RATE", rate)


@pytest.mark.parametrize("rate", ["3e-06", "3e-6", "3E-6", ".3e-5", "+3.e-06", "0.000003", "3.0e-06"])
def test_numbers_are_those_that_kubectl_takes_for_numbers(tmp_path: Path, document: dict[str, Any], rate: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_with_rate(document, rate))
    assert read(path).run.spec.training.learning_rate == 3e-6


@pytest.mark.parametrize("number", ["0o17", "0O17", "+0o1_7", "0_o17", "0X0f", "0B1111", "017", "1_5", "+_15"])
def test_integers_of_every_base_are_those_that_kubectl_takes_for_integers(tmp_path: Path, document: dict[str, Any], number: str) -> None:
    document["spec"]["rollouts"] = {"workers": "WORKERS"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document).replace("WORKERS", number))
    assert read(path).run.spec.rollouts.workers == 15


@pytest.mark.parametrize(("word", "enabled"), [("y", True), ("Y", True), ("n", False), ("N", False), ("On", True), ("no", False)])
def test_booleans_are_those_that_kubectl_takes_for_booleans(tmp_path: Path, document: dict[str, Any], word: str, enabled: bool) -> None:
    document["spec"]["suspend"] = "SUSPEND"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document).replace("SUSPEND", word))
    assert read(path).run.spec.suspend is enabled


MISTAKEN = (
    "y",
    "Y",
    "n",
    "N",
    "Off",
    "0o17",
    "0O17",
    "-0o1_7",
    "0_o17",
    "0X1F",
    "-0B1",
    "0_8",
    "1_0e5",
    "1e_5",
    "-_5",
    "3e-06",
    "017",
    "~",
)
"""Texts that go-yaml reads as something else where they are not in quotes."""


@pytest.mark.parametrize("text", ["'3e-06'", "3e-06x", "2026-01-01", "e6", "."])
def test_what_kubectl_takes_for_text_is_no_number(tmp_path: Path, document: dict[str, Any], text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(_with_rate(document, text))
    with pytest.raises(InvalidRun, match="learningRate"):
        read(path)


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path, document: dict[str, Any]) -> None:
    @given(
        st.one_of(
            st.sampled_from(MISTAKEN),
            st.from_regex(r"[-+]?[0-9.]{1,4}[eE_]?[-+0-9]{0,3}", fullmatch=True),
            st.text("0123456789eE.+-_: ~=<", min_size=1),
        )
    )
    def whatever_its_texts_look_like(text: str) -> None:
        document["metadata"]["annotations"] = {text: text}
        path = tmp_path / "run.yaml"
        path.write_text(written(load(document)))
        assert read(path).run == load(document)

    whatever_its_texts_look_like()


def test_text_that_kubectl_would_take_for_something_else_is_written_in_quotes(document: dict[str, Any]) -> None:
    document["metadata"]["annotations"] = {text: text for text in MISTAKEN}
    assert written(load(document)).count("'") == 4 * len(MISTAKEN)


@pytest.mark.heavy
def test_kubectl_reads_a_run_back_as_it_was_written(document: dict[str, Any]) -> None:
    document["metadata"]["annotations"] = {text: text for text in MISTAKEN}
    command = [built("kubernetes", "kubectl"), "annotate", "--local", "-o", "json", "-f", "-", "told-by=kubectl"]
    told = subprocess.run(command, input=written(load(document)), capture_output=True, text=True, check=True).stdout
    assert load(json.loads(told)).metadata.annotations == {**document["metadata"]["annotations"], "told-by": "kubectl"}


@pytest.mark.heavy
@pytest.mark.parametrize("sample", sorted((ROOT / "manifests/samples").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_kubectl_writes_of_a_run_is_the_run(tmp_path: Path, sample: Path) -> None:
    command = [built("kubernetes", "kubectl"), "annotate", "--local", "-o", "yaml", "-f", sample, "told-by=kubectl"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "3e-06" in told or sample.stem == "endpoint-teacher"
    path = tmp_path / "told.yaml"
    path.write_text(told)
    assert read(path).run.spec == read(sample).run.spec
    assert read(path).secrets == read(sample).secrets


@pytest.mark.parametrize("value", ["12e4", "0123", "yes", "[a]"])
def test_a_secret_that_yaml_takes_for_no_text_is_refused_without_showing_it(tmp_path: Path, document: dict[str, Any], value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{yaml.safe_dump(document)}---\nkind: Secret\nmetadata: {{name: key}}\nstringData: {{token: {value}}}\n")
    with pytest.raises(InvalidRun, match=r"Secret key\.stringData\.token: is no text: write it in quotes"):
        read(path)
