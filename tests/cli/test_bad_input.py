"""Bad input ends with one message that names field, value and remedy, and changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest


def _with(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    *parents, last = path.split(".")
    place = changed
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.round", 3, "spec.round: unknown field: did you mean 'rounds'?"),
        ("spec.mixing.beta", {"type": "Constant", "value": 1.5}, "spec.mixing.beta.value: got 1.5: beta is a probability"),
        ("spec.rounds", 0, "spec.rounds: got 0: write a value greater than or equal to 1"),
        ("spec.teacher.serving", {"gpus": 1}, "give the teacher exactly one of serving and endpoint"),
        ("spec.storage.url", "ftp://x", "spec.storage.url: got 'ftp://x'"),
        ("metadata.name", "Not_A_Label", "metadata.name: got 'Not_A_Label'"),
    ],
)
def test_validate_names_field_value_and_remedy(ctl: Any, document: dict[str, Any], path: str, value: Any, said: str) -> None:
    answer = ctl("validate", "run.yaml", documents=[_with(document, path, value)])
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_validate_tells_every_problem_at_once(ctl: Any, document: dict[str, Any]) -> None:
    broken = _with(_with(document, "spec.rounds", 0), "spec.seed", -1)
    answer = ctl("validate", "run.yaml", documents=[broken])
    assert "spec.rounds" in answer.stderr and "spec.seed" in answer.stderr


def test_validate_accepts_a_valid_file(ctl: Any, document: dict[str, Any]) -> None:
    answer = ctl("validate", "run.yaml", documents=[document])
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "'small' is valid" in answer.stdout


def test_what_is_no_yaml_or_not_there_is_said_plainly(ctl: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "is no YAML" in ctl("validate", "broken.yaml").stderr
    assert "No such file" in ctl("validate", "absent.yaml").stderr


def test_a_file_with_other_objects_is_refused(ctl: Any, document: dict[str, Any]) -> None:
    answer = ctl("validate", "run.yaml", documents=[document, {"kind": "ConfigMap", "metadata": {"name": "x"}}])
    assert answer.returncode == 2 and "ConfigMap" in answer.stderr


def test_a_secret_that_is_no_base64_is_refused_without_showing_it(ctl: Any, document: dict[str, Any]) -> None:
    secret = {"kind": "Secret", "metadata": {"name": "key"}, "data": {"token": "not base64!"}}
    answer = ctl("validate", "run.yaml", documents=[document, secret])
    assert answer.returncode == 2 and "stringData" in answer.stderr and "not base64!" not in answer.stderr


@pytest.mark.parametrize(
    "command", [("status", "absent"), ("resume", "absent"), ("export", "absent", "--to", "x"), ("store", "fsck", "absent")]
)
def test_an_unknown_run_is_named_beside_those_that_there_are(ctl: Any, command: tuple[str, ...]) -> None:
    answer = ctl(*command)
    assert answer.returncode == 2
    assert "no run 'absent'" in answer.stderr and "runs there: none" in answer.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spec: {2026-01-01: x}", "spec.2026-01-01: unknown field"),
        ("spec: {!!binary eA==: x}", "unknown field"),
        ("spec: {? [a] : x}", "is no YAML"),
        ("---\nkind: [DAggerRun]", "holds"),
        ("---\nkind: Secret\nmetadata: [x]", "Secret.metadata.name: missing: a Secret needs a name"),
        ("---\nkind: Secret\nmetadata: {name: key}\nstringData: [x]", "Secret key.stringData: is no mapping"),
        ("---\nkind: Secret\nmetadata: {name: key}\ndata: x", "Secret key.data: is no mapping"),
    ],
)
def test_whatever_yaml_makes_of_a_file_ends_in_a_message(ctl: Any, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(f"kind: DAggerRun\nmetadata: {{name: small}}\n{text}\n")
    answer = ctl("validate", "run.yaml")
    assert answer.returncode == 2
    assert said in answer.stderr and "Traceback" not in answer.stderr


def test_a_home_that_cannot_be_written_is_named(ctl: Any, document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".dagger").write_text("a file")
    answer = ctl("run", "run.yaml", documents=[document])
    assert answer.returncode == 2
    assert ".dagger/runs/small: Not a directory" in answer.stderr and "Traceback" not in answer.stderr
