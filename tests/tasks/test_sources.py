"""Task sources: what is read, and what is refused in which words."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dagger_operator.api import HeldOut, SourceType, Storage, Tasks, TaskSource
from dagger_operator.store.objects import Store
from dagger_operator.store.stage import StageFailure
from dagger_operator.tasks.sources import load_held_out, load_tasks, load_training
from dagger_operator.tasks.task import ScriptGrading, SwebenchGrading, Task

OWN: list[dict[str, Any]] = [
    {
        "id": f"t{number}",
        "statement": "Mend it.",
        "files": {"a/b.py": "x = 'ä'\n", "c.txt": ""},
        "grading": {"type": "Script", "files": {"check.py": "pass"}, "command": "python3 check.py"},
        "split": "train" if number < 2 else "heldout",
    }
    for number in range(3)
]
SWE: dict[str, Any] = {
    "instance_id": "Owner__Repo-17",
    "problem_statement": "It fails.",
    "image": "docker.io/swebench/sweb.eval.x86_64.owner_1776_repo-17:latest",
    "repo": "Owner/Repo",
    "version": "1.0",
    "FAIL_TO_PASS": '["a"]',
    "PASS_TO_PASS": "[]",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
    "eval_script": "#!/bin/bash\n",
    "patch": "the solution",
    "hints_text": "the solution too",
}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def source(kind: SourceType, uri: object, split: str | None = None) -> TaskSource:
    return TaskSource(type=kind, uri=str(uri), split=split)


async def test_jsonl_is_read_from_a_path_a_file_url_and_object_storage(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(lines(*OWN) + "\n")
    await store.put("inputs/tasks.jsonl", path.read_bytes())
    expected = tuple(Task.model_validate(row) for row in OWN)
    for uri in (path, f"file://{path}", f"{store.url}/inputs/tasks.jsonl"):
        assert (await load_tasks(source(SourceType.JSONL, uri), store, {})).tasks == expected
    (train,) = {task.split for task in (await load_tasks(source(SourceType.JSONL, path, "train"), store, {})).tasks}
    assert train == "train"


async def test_parquet_holds_the_same_tasks_as_structs_as_maps_or_as_json_text(tmp_path: Path, store: Store) -> None:
    expected = tuple(Task.model_validate(row) for row in OWN)
    texts = [{**row, "files": json.dumps(row["files"]), "grading": json.dumps(row["grading"])} for row in OWN]
    mapped = pa.schema(
        [
            ("id", pa.string()),
            ("statement", pa.string()),
            ("files", pa.map_(pa.string(), pa.string())),
            ("grading", pa.string()),
            ("split", pa.string()),
        ]
    )
    tables = {
        "struct": pa.Table.from_pylist(OWN),
        "text": pa.Table.from_pylist(texts),
        "map": pa.Table.from_pylist(
            [{**row, "files": list(row["files"].items()), "grading": json.dumps(row["grading"])} for row in OWN], schema=mapped
        ),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
        assert (await load_tasks(source(SourceType.PARQUET, tmp_path / f"{name}.parquet"), store, {})).tasks == expected, name


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
async def test_swebench_rows_lose_their_solution_and_keep_their_grading(tmp_path: Path, store: Store, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(lines(SWE))
    else:
        pq.write_table(pa.Table.from_pylist([SWE]), path)
    (task,) = (await load_tasks(source(SourceType.SWE_BENCH, path), store, {})).tasks
    assert (task.id, task.statement, task.workdir, task.image) == ("Owner__Repo-17", "It fails.", "/testbed", SWE["image"])
    assert isinstance(task.grading, SwebenchGrading) and task.grading.row["eval_script"] == "#!/bin/bash\n"
    assert "solution" not in task.model_dump_json()


async def test_images_are_named_by_each_data_sets_rule(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines({key: value for key, value in SWE.items() if key != "image"}))
    for kind, image in (
        (SourceType.SWE_BENCH, "docker.io/swebench/sweb.eval.x86_64.owner_1776_repo-17:latest"),
        (SourceType.SWE_GYM, "docker.io/xingyaoww/sweb.eval.x86_64.owner_s_repo-17:latest"),
    ):
        (task,) = (await load_tasks(source(kind, path), store, {})).tasks
        assert task.image == image
        assert isinstance(task.grading, SwebenchGrading) and task.grading.row["image"] == image


def without(row: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in fields}


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        (SourceType.JSONL, lines(OWN[0]) + "{not json\n", r"line 2 is no JSON .*one object a line"),
        (SourceType.JSONL, lines(OWN[0], [1]), r"line 2 is no object but list"),
        (SourceType.JSONL, "", r"it holds no rows"),
        (SourceType.JSONL, lines(OWN[0], without(OWN[1], "statement")), r"row 2, field statement: missing"),
        (SourceType.JSONL, lines({**OWN[0], "stmt": 1}), r"row 1, field stmt: unknown field"),
        (SourceType.JSONL, lines({**OWN[0], "grading": {"type": "Script"}}), r"row 1, field grading"),
        (SourceType.JSONL, lines({**OWN[0], "env": {"A=B": "x"}}), r"row 1, field env.*A=B"),
        (SourceType.JSONL, lines({**OWN[0], "env": {"A": "x\0"}}), r"row 1, field env.A"),
        (SourceType.JSONL, lines(OWN[0], OWN[1], OWN[0]), r"row 3, field id: 't0' is row 1's already"),
        (SourceType.PARQUET, "PAR1 cut short", r"no whole Parquet file"),
        (
            SourceType.SWE_BENCH,
            lines(without(SWE, "eval_script", "log_parser")),
            r"row 1, field log_parser, eval_script: missing.*SWE-bench/SWE-bench_Verified",
        ),
        (SourceType.SWE_GYM, lines(without(SWE, "eval_script")), r"field eval_script: missing: SWE-Gym's own rows are known for bokeh"),
        (SourceType.SWE_BENCH, lines(without(SWE, "instance_id")), r"row 1, field instance_id: missing"),
        (
            SourceType.SWE_BENCH,
            lines(SWE, {**SWE, "instance_id": "o__r-2", "log_parser": "parse_log_pitest"}),
            r"row 2, field log_parser: got 'parse_log_pitest': swebench knows parse_log_pytest, ",
        ),
        (SourceType.SWE_GYM, lines({**SWE, "log_parser": ["parse_log_pytest"]}), r"row 1, field log_parser: got .* swebench knows "),
        (SourceType.SWE_BENCH, lines({**SWE, "eval_type": "pass_fail"}), r"field eval_type: got 'pass_fail': .* pass_and_fail, fail_only"),
        (SourceType.SWE_BENCH, lines({**SWE, "FAIL_TO_PASS": "x::t"}), r"field FAIL_TO_PASS: got 'x::t': write a list of test names"),
        (SourceType.SWE_BENCH, lines({**SWE, "PASS_TO_PASS": '{"a": 1}'}), r"field PASS_TO_PASS: .* write a list of test names"),
        (SourceType.SWE_BENCH, lines({**SWE, "PASS_TO_PASS": ["a", 1]}), r"field PASS_TO_PASS: .* write a list of test names"),
        (
            SourceType.SWE_BENCH,
            lines({**SWE, "eval_script": ["pytest"]}),
            r"field eval_script: .* write the whole shell script as one text",
        ),
    ],
)
async def test_bad_rows_are_named_with_file_row_field_and_remedy(
    tmp_path: Path, store: Store, kind: SourceType, text: str, complaint: str
) -> None:
    path = tmp_path / ("rows.parquet" if kind is SourceType.PARQUET else "rows.jsonl")
    path.write_text(text)
    with pytest.raises(StageFailure, match=complaint) as caught:
        await load_tasks(source(kind, path), store, {})
    assert caught.value.reason == "InvalidTasks" and str(path) in caught.value.message and caught.value.permanent


async def test_what_is_not_there_is_said_so(tmp_path: Path, store: Store) -> None:
    (tmp_path / "tasks.jsonl").write_text(lines(*OWN))
    for uri, split, complaint in (
        (tmp_path / "missing.jsonl", None, "cannot be read: No such file"),
        (f"{store.url}/missing.jsonl", None, "cannot be read|no such object"),
        ("http://example.invalid/tasks.jsonl", None, "no URL of object storage such as s3://"),
        (tmp_path / "tasks.jsonl", "test", "split 'test' has no rows; there are: heldout, train"),
    ):
        with pytest.raises(StageFailure, match=complaint):
            await load_tasks(source(SourceType.JSONL, uri, split), store, {})


async def test_held_out_tasks_in_the_training_set_are_refused(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(lines(*({**row, "image": "repo:tag"} for row in OWN)))
    spec = Tasks(
        source=source(SourceType.JSONL, path, "train"),
        held_out=HeldOut(source=source(SourceType.JSONL, path, "heldout")),
        image_prefix="mirror.example/x/",
    )
    assert [(task.id, task.image) for task in await load_training(spec, store, {})] == [
        ("t0", "mirror.example/x/library/repo:tag"),
        ("t1", "mirror.example/x/library/repo:tag"),
    ]
    assert [task.id for task in await load_held_out(spec, store, {})] == ["t2"]
    with pytest.raises(StageFailure, match=r"InvalidTasks: 1 tasks .* are held out too, such as t2.*different splits"):
        another = Store.open(Storage(url=f"file://{tmp_path}/another-run"))
        await load_training(spec.model_copy(update={"source": source(SourceType.JSONL, path)}), another, {})


async def test_a_tasks_environment_is_read_and_a_row_without_one_stays_as_it_was(tmp_path: Path, store: Store) -> None:
    env = {"BASH_ENV": "/root/.bashrc"}
    (tmp_path / "tasks.jsonl").write_text(lines({**OWN[0], "env": env}, {**OWN[1], "env": json.dumps(env)}, OWN[2]))
    one, other, without = (await load_tasks(source(SourceType.JSONL, tmp_path / "tasks.jsonl"), store, {})).tasks
    assert (one.env, other.env, without.env) == (env, env, {})
    assert json.loads(one.model_dump_json())["env"] == env
    assert "env" not in json.loads(without.model_dump_json())


@pytest.mark.parametrize("readable", [True, False], ids=["readable", "closed"])
async def test_commands_of_swe_tasks_activate_what_they_can_read_and_print_nothing_where_they_cannot(
    tmp_path: Path, store: Store, readable: bool
) -> None:
    (tmp_path / "tasks.jsonl").write_text(lines(SWE))
    (task,) = (await load_tasks(source(SourceType.SWE_BENCH, tmp_path / "tasks.jsonl"), store, {})).tasks
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / ".bashrc").write_text("export ACTIVE=testbed\n")
    folder.chmod(0o700 if readable else 0)
    env = {name: value.replace("/root/", f"{folder}/") for name, value in task.env.items()}
    assert env != task.env
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if not readable and os.geteuid() == 0 else {}
    done = subprocess.run(["bash", "-c", 'echo "$? $ACTIVE"'], env=env, cwd="/", text=True, capture_output=True, check=False, **nobody)
    folder.chmod(0o700)
    assert (done.stderr, done.stdout) == ("", "0 testbed\n" if readable else "0 \n")


@pytest.mark.parametrize(
    ("image", "pulled"),
    [
        # As ECR's pull-through caches, Harbor's proxies and Artifact Registry's remote repositories name images of Docker Hub.
        ("docker.io/swebench/sweb.eval:latest", "mirror.example:5000/hub/swebench/sweb.eval:latest"),
        ("index.docker.io/swebench/sweb.eval:latest", "mirror.example:5000/hub/swebench/sweb.eval:latest"),
        ("swebench/sweb.eval:latest", "mirror.example:5000/hub/swebench/sweb.eval:latest"),
        ("docker.io/python:3.12", "mirror.example:5000/hub/library/python:3.12"),
        ("python:3.12", "mirror.example:5000/hub/library/python:3.12"),
        # What a mirror of Docker Hub does not have.
        ("ghcr.io/owner/image:1", "ghcr.io/owner/image:1"),
        ("localhost/image", "localhost/image"),
        ("registry:5000/image", "registry:5000/image"),
    ],
)
@pytest.mark.parametrize("slash", ["", "/"])
async def test_a_mirror_stands_in_the_place_of_docker_hub_alone(tmp_path: Path, store: Store, image: str, pulled: str, slash: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(lines(*({**row, "image": image} for row in OWN)))
    spec = Tasks(
        source=source(SourceType.JSONL, path, "train"),
        held_out=HeldOut(source=source(SourceType.JSONL, path, "heldout")),
        image_prefix=f"mirror.example:5000/hub{slash}",
    )
    assert {task.image for task in (*await load_training(spec, store, {}), *await load_held_out(spec, store, {}))} == {pulled}


ROOT = Path(__file__).resolve().parents[2]


async def test_a_row_as_the_documents_have_it_is_a_task_with_every_field_that_they_name(tmp_path: Path, store: Store) -> None:
    section = (ROOT / "docs" / "data-format.md").read_text().partition("\n## Tasks\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.M)
    assert [name for name, _, _ in rows] == list(Task.model_fields)
    assert {name for name, kind, _ in rows if "required" in kind} == {n for n, field in Task.model_fields.items() if field.is_required()}
    assert f"default `{Task.model_fields['workdir'].default}`" in {name: meaning for name, _, meaning in rows}["workdir"]
    (line,) = re.findall(r"^```json\n(.*)\n```$", section, re.M)
    assert list(json.loads(line)) == list(Task.model_fields)
    (tmp_path / "tasks.jsonl").write_text(line)
    (task,) = (await load_tasks(source(SourceType.JSONL, tmp_path / "tasks.jsonl"), store, {})).tasks
    assert task.model_fields_set == set(Task.model_fields) and isinstance(task.grading, ScriptGrading)


def test_a_script_grading_needs_nothing_but_a_command() -> None:
    assert Task(id="x", statement="", grading=ScriptGrading(command="true")).files == {}
