"""The CRD says what the models say."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from pydantic import ValidationError

from dagger_operator.api import DAggerRun, InvalidRun, load
from dagger_operator.api.crd import crd, rendered, schema
from dagger_operator.api.reference import reference

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


def nodes(node: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(node[key], f"{path}[]")


def strict(node: Json) -> Json:
    """The schema as an API server applies it under strict field validation: what is not known is refused."""
    node = {key: value for key, value in node.items() if key != "format"}
    if "properties" in node:
        node["properties"] = {name: strict(inner) for name, inner in node["properties"].items()}
        node["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = strict(node[key])
    return node


def defaulted(node: Json, value: Any) -> Any:
    """Structural defaulting, as an API server does it before validation."""
    if isinstance(value, dict):
        value = dict(value)
        for name, inner in node.get("properties", {}).items():
            if name not in value and "default" in inner:
                value[name] = copy.deepcopy(inner["default"])
            if name in value:
                value[name] = defaulted(inner, value[name])
    if isinstance(value, list):
        value = [defaulted(node["items"], item) for item in value]
    return value


def test_whatever_names_an_object_can_name_nothing_else() -> None:
    spec = schema()["properties"]["spec"]
    names = [(path, node) for path, node in nodes(spec) if re.search(r"(\.name|Name|\.namespace)$", path)]
    assert {".storage.secretRef.name", ".teacher.endpoint.secretRef.name", ".sandbox.namespace"} <= {path for path, _ in names}
    assert [path for path, node in names if re.search(node.get("pattern", ""), "../x")] == []


def test_the_files_in_the_repository_are_those_that_the_models_make() -> None:
    stale = [str(path) for path, text in rendered().items() if (ROOT / path).read_text() != text]
    assert not stale, f"run `python -m dagger_operator.api.crd`: {stale}"


def test_the_reference_describes_every_object_and_the_same_one_once() -> None:
    page = reference(schema())
    objects = [path for root in ("spec", "status") for path, node in nodes(schema()["properties"][root], root) if "properties" in node]
    headings, also = re.findall("^## (.+)$", page, re.M), re.findall("`(.+?)`", "".join(re.findall("^Also at (.+)$", page, re.M)))
    assert sorted(headings + also) == sorted(objects)
    assert [heading for heading in headings if heading.endswith(".pod")] == ["spec.student.serving.pod", "spec.sandbox.pod"]


@pytest.mark.parametrize(
    "row",
    [
        "| `training` | [object](#spectraining) | see its section | How labels become the next student. |",
        "| `priorityClass` | string, ≤ 63 characters, `^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$` |  | WorkloadPriorityClass. |",
        "| `labels` | map to string (≤ 63 characters, `^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`), ≤ 32 entries | `{}` "
        "| Further labels of the pods. |",
        "| `mode` | `Inline`, `Async`, `Deferred` | `Async` "
        "| Inline: before the action is returned. Async: while the rollout continues. Deferred: when it has ended, all at once. |",
    ],
)
def test_the_reference_has_a_row_for_each_field(row: str) -> None:
    assert row in reference(schema()).splitlines()


def test_the_reference_states_a_rule_once() -> None:
    for section in reference(schema()).split("\n## "):
        rules = re.findall("^- .+$", section, re.M)
        assert len(rules) == len(set(rules))


def test_the_schema_is_structural() -> None:
    for path, node in nodes(schema()):
        assert "type" in node, path
        assert not {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title"} & node.keys(), path
        assert not ("properties" in node and "additionalProperties" in node), path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert isinstance(node.get(bound, True), bool), path
        if node["type"] == "array":
            assert node["x-kubernetes-list-type"] in ("atomic", "map"), path
            for key in node.get("x-kubernetes-list-map-keys", ()):
                assert key in node["items"]["required"], f"{path}: items without their key"


def test_whatever_a_user_writes_is_bounded_so_that_rules_have_a_cost() -> None:
    for path, node in nodes(schema()["properties"]["spec"]):
        if node["type"] == "string":
            assert "maxLength" in node or "enum" in node, path
        if node["type"] == "array":
            assert "maxItems" in node, path
        if node["type"] == "integer":
            assert {"minimum", "maximum"} <= node.keys(), path


def test_every_field_has_a_description() -> None:
    undocumented = [path for path, node in nodes(schema()["properties"]["spec"]) if not path.endswith("[]") and not node.get("description")]
    # Names that say all there is to say.
    assert {path.rsplit(".", 1)[-1] for path in undocumented} <= {"name", "value", "adamBeta1", "adamBeta2"}


def test_rules_speak_only_of_fields_that_exist() -> None:
    seen = 0
    for path, node in nodes(schema()):
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"]
            for found in re.findall(r"(?:self|oldSelf)((?:\.\??[a-zA-Z]+)+)(\()?", rule["rule"]):
                parts = [part.lstrip("?") for part in found[0].strip(".").split(".")]
                current = node
                for part in parts[:-1] if found[1] else parts:  # the last one before a parenthesis is a function
                    if path == "" and parts[0] == "metadata":
                        break
                    assert part in current["properties"], f"{path}: {rule['rule']}"
                    current = current["properties"][part]
                seen += 1
    assert seen > 20


def test_status_is_a_subresource_and_columns_point_at_fields() -> None:
    version = crd()["spec"]["versions"][0]
    assert version["subresources"] == {"status": {}}
    names = [column["name"] for column in version["additionalPrinterColumns"]]
    assert names[:6] == ["Phase", "Round", "Resolved", "Teacher", "Reason", "Age"]
    for column in version["additionalPrinterColumns"]:
        node = version["schema"]["openAPIV3Schema"]
        for part in column["jsonPath"].strip(".").split("."):
            if part == "metadata":
                break
            node = node["properties"][part]
    status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    assert status["conditions"]["x-kubernetes-list-map-keys"] == ["type"]
    assert status["rounds"]["x-kubernetes-list-map-keys"] == ["round"]


def test_an_api_server_fills_in_the_defaults_of_the_models(document: Json) -> None:
    filled = defaulted(schema(), document)
    assert filled["spec"] == load(document).spec.wire()
    assert load(filled) == load(document)


# Documents that are right, and documents that are wrong at one place in any way.

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.sampled_from([-1, 0, 1, 2, 64, 1000, 1001, 2**31, 2**53]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.5, 1.0, 1.5, -0.1]),
    st.text(max_size=12),
    st.sampled_from(["PerTurn", "Constant", "List", "s3://b/p", "http://x/v1", "5", "true", "A=B", "x" * 2049]),
    st.lists(st.integers(0, 3) | st.text(max_size=3), max_size=4),
    st.dictionaries(st.sampled_from(["type", "value", "name", "values", "unknown"]), st.integers(0, 3) | st.text(max_size=3), max_size=3),
)

FULL: Json = {
    "rounds": 3,
    "mixing": {"beta": {"type": "List", "values": [1.0, 0.5]}, "maxPrefixTurns": {"type": "Linear", "start": 1, "step": 2, "limit": 9}},
    "student": {
        "model": "m",
        "serving": {"gpus": 0, "env": [{"name": "A", "value": "b"}], "extraArgs": ["--x"], "toolCallParser": "hermes"},
    },
    "teacher": {"model": "t", "endpoint": {"url": "http://x/v1", "secretRef": {"name": "s"}}, "sampling": {"temperature": 0}},
    "tasks": {
        "source": {"type": "Parquet", "uri": "u", "split": "train"},
        "heldOut": {"source": {"type": "SWEbench", "uri": "u"}, "count": 3},
        "firstRound": 4,
    },
    "scaffold": {"type": "Command", "command": ["run"], "systemTemplate": "s"},
    "sandbox": {"limits": {"cpus": 0.5}, "backend": "Process"},
    "labels": {"minCoverage": 0.5},
    "rollouts": {
        "pod": {
            "affinity": {"nodeAffinity": {}},
            "tolerations": [{"key": "gpu", "effect": "NoSchedule"}],
            "labels": {"team": "a"},
            "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}],
            "envFrom": [{"secretRef": {"name": "hub"}}],
        }
    },
    "failurePolicy": {"rules": [{"stages": ["Training"], "reasons": ["OOMKilled"], "exitCodes": [9], "action": "FailRun"}]},
    "kueue": {"queueName": "q"},
    "training": {"steps": {"type": "Constant", "value": 5}, "deepspeed": {"zeroStage": 3}, "lora": {"targetModules": ["q_proj"]}},
    "evaluation": {"confidence": 0.9, "maxTurns": 3},
    "storage": {"url": "gs://b/p", "secretRef": {"name": "s"}},
    "ttlSecondsAfterFinished": 5,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


FILLED = defaulted(schema()["properties"]["spec"], FULL)
PLACES = sorted(places(FILLED), key=str)


@st.composite
def specs(draw: st.DrawFn) -> Json:
    spec = copy.deepcopy(FILLED)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(PLACES))
        parent: Any = spec
        for part in path[:-1]:
            try:
                parent = parent[part]
            except (KeyError, IndexError, TypeError):
                break
        else:
            change = draw(st.sampled_from(["replace", "replace", "remove", "misspell"]))
            if not isinstance(parent, dict if isinstance(path[-1], str) else list):
                continue  # an earlier change has put something else in its place
            if change == "replace" and (isinstance(parent, dict) or path[-1] < len(parent)):
                parent[path[-1]] = draw(JUNK)
            elif isinstance(parent, dict) and change == "remove":
                parent.pop(path[-1], None)
            elif isinstance(parent, dict) and change == "misspell":
                parent[f"{path[-1]}x"] = parent.pop(path[-1], 0)
    return spec


VALIDATOR = Draft4Validator(strict(schema()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_the_schema_accepts_what_the_models_accept_and_nothing_else(spec: Json) -> None:
    document = {"metadata": {"name": "run"}, "spec": spec}
    by_schema = VALIDATOR.is_valid(without_nulls(document))
    try:
        load(document)
        by_models = True
    except InvalidRun as refused:
        cause = refused.__context__
        assert isinstance(cause, ValidationError)
        # What fits field by field and not together is the business of rules, not of the schema.
        by_models = all(error["type"] == "value_error" for error in cause.errors())
    assert by_schema == by_models


def without_nulls(value: Any) -> Any:
    """An API server drops a null where the schema does not allow one; it is then as if the field were not given."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def test_the_model_of_the_resource_and_the_schema_name_the_same_fields() -> None:
    fields = {field.alias for name, field in DAggerRun.model_fields.items()}
    assert fields == set(schema()["properties"])


@pytest.mark.parametrize("name", ["Run", "1run", "run-", "r" * 33, "run.a", ""])
def test_a_name_that_cannot_be_part_of_a_host_name_is_refused(document: Json, name: str) -> None:
    document["metadata"]["name"] = name
    with pytest.raises(InvalidRun, match=r"metadata\.name"):
        load(document)
