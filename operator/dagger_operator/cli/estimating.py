"""`daggerctl estimate`: what a run will take, before any of it runs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dagger_operator.api import InvalidRun, Problem
from dagger_operator.cli.documents import read
from dagger_operator.cli.estimate_tables import tables
from dagger_operator.cli.exits import Exit
from dagger_operator.estimate import GIB, GPUS, KNOWN, Assumptions, Gpu, Shape, UnknownShape, as_data, estimate, shape_of


def show_estimate(file: Path, hardware: Gpu, configs: dict[str, Path | None], given: dict[str, Any], output: str) -> int:
    """Print the estimate of a file's run. `configs`: `config.json` of student and teacher, if given; `given`: assumptions."""
    if output not in ("table", "json"):
        print(f"error: --output: {output!r}: write table or json", file=sys.stderr)
        return Exit.BAD_INPUT
    spec = read(file).run.spec
    student = _shape("student", spec.student.model, configs["student"])
    teacher = _shape("teacher", spec.teacher.model, configs["teacher"]) if spec.teacher.serving and spec.teacher.serving.gpus else None
    found = estimate(spec, hardware, student, teacher, Assumptions.of(spec, **given))
    if output == "json":
        print(json.dumps(as_data(found), indent=2))
    else:
        Console().print(tables(spec, found))
    return Exit.OK if found.fits else Exit.FAILED


def gpu(name: str, memory: float | None, tflops: float | None, bandwidth: float | None) -> Gpu:
    """Return a GPU by name, with stated values (GiB, TFLOP/s, TB/s) taking precedence. An unknown GPU needs all three."""
    stated = {"--gpu-memory": memory, "--gpu-tflops": tflops, "--gpu-bandwidth": bandwidth}
    wrong = [
        Problem(option, f"got {value}", "write a number above 0")
        for option, value in stated.items()
        if value is not None and not 0 < value < math.inf
    ]
    if wrong:
        raise InvalidRun(wrong)
    known = GPUS.get(name, Gpu(name, 0.0, 0.0, 0.0))
    made = Gpu(
        name=name,
        memory=known.memory if memory is None else memory * GIB,
        flops=known.flops if tflops is None else tflops * 1e12,
        bandwidth=known.bandwidth if bandwidth is None else bandwidth * 1e12,
    )
    if 0.0 in (made.memory, made.flops, made.bandwidth):
        remedy = f"write one of {', '.join(GPUS)}, or state all of {', '.join(stated)}"
        raise InvalidRun([Problem("--gpu", f"got {name!r}", remedy)])
    return made


def _shape(role: str, model: str, config: Path | None) -> Shape:
    """Return the shape from the given file or folder, from the model if it is a local folder, or from what is known of the model."""
    option = "--config" if role == "student" else "--teacher-config"
    if config is None and model in KNOWN:
        return KNOWN[model]
    field = option if config is not None else f"{role}.model"
    path = config or Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise UnknownShape("is no JSON object", "give the model's config.json")
        return shape_of(document, _chat_template(path.parent))
    except OSError as error:
        found = "cannot be read" if config is not None else f"{model!r} is not known here, and no folder"
        raise InvalidRun([Problem(field, found, f"{error.strerror}: give its config.json by {option}")]) from None
    except UnknownShape as error:
        raise InvalidRun([Problem(field, f"{path} {error.problem}", error.remedy)]) from None
    except ValueError:
        raise InvalidRun([Problem(field, f"{path} is no JSON", "give the model's config.json")]) from None


def _chat_template(folder: Path) -> str:
    """Return the text that holds a model's chat template: its own file, or the tokenizer's settings. Empty if neither exists."""
    files = (folder / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return next((file.read_text(errors="replace") for file in files if file.is_file()), "")
