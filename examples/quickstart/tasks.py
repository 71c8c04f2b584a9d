"""Generates small software-repair tasks from a seed: a folder with a few modules, one injected bug, and a check that fails.

    python examples/quickstart/tasks.py --seed 1 --train 400 --held-out 100 --out tasks.jsonl

The functions of a task call one of four helpers in `lib.py`, all arithmetic modulo 97. Mostly the bug is a call of the
wrong helper, sometimes a constant with a wrong value. The check prints the actual and the expected value: a teacher
that can do the arithmetic knows the right helper at once. A tiny student cannot, so it must guess, test, and guess
again: states that a teacher's own work never contains.
"""

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from dagger_operator.tasks.task import ScriptGrading, Task

MODULUS = 97
HELPERS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "mul": ("a * b", lambda a, b: a * b % MODULUS),
    "dot": ("a * a + b * b", lambda a, b: (a * a + b * b) % MODULUS),
    "mix": ("a * a * b + a", lambda a, b: (a * a * b + a) % MODULUS),
    "fold": ("a * b * b + 7 * b", lambda a, b: (a * b * b + 7 * b) % MODULUS),
}
"""Helper by name: its formula as written in `lib.py`, and the same as a function."""

# fmt: off
MODULES = [
    "tax", "geo", "net", "bank", "mail", "shop", "user", "cart", "road", "menu", "lamp", "fuel", "ship", "farm", "gate", "book",
]
FUNCTIONS = [
    "scale", "rank", "merge", "grade", "shift", "bound", "trace", "weigh", "count", "split", "blend",
    "order", "price", "route", "quota", "ratio", "score", "limit", "drift", "phase", "chain", "delta",
    "gauge", "index", "level", "match", "orbit", "plane", "query", "reach", "shape", "track",
]
CONSTANTS = [
    "RATE", "SIZE", "CAP", "STEP", "BASE", "GAIN", "MASK", "SPAN",
]
# fmt: on

STATEMENT = "python3 test.py fails. Find the bug, fix it, and submit."
TEST = "python3 test.py"
ORIGINALS = ".orig"

_RUNNER = '''\
"""Runs the checks and prints the first that fails."""
import importlib, sys
sys.dont_write_bytecode = True  # two edits within one second must not meet a stale cache
CHECKS = [
{checks}
]
for module, name, arguments, want in CHECKS:
    try:
        value = getattr(importlib.import_module(module), name)
        got = value(*arguments) if arguments else value
    except Exception as error:
        sys.exit(f"ERROR {{module}}.py {{type(error).__name__}}")
    if got != want:
        call = f"({{arguments[0]}}, {{arguments[1]}})" if arguments else ""
        shown = getattr(got, "__name__", got)  # a function's own text has an address in it, another one in every process
        sys.exit(f"FAIL {{name}}{{call}} got {{shown}} want {{want}}")
print(f"PASS {{len(CHECKS)}} checks")
'''

Check = tuple[str, str, tuple[int, ...], int]
"""Module, name in it, arguments (none for a constant), expected value."""


def is_held_out(module: str, name: str) -> bool:
    """Whether this pair of module and name belongs to the held-out split: every name is seen in training, a quarter of the pairs never."""
    return hashlib.sha256(f"{module}.{name}".encode()).digest()[0] % 4 == 0


def generate(seed: int, count: int, *, held_out: bool) -> Iterator[Task]:
    """Yield `count` tasks of one split; the same seed gives the same tasks."""
    split = "heldout" if held_out else "train"
    for index in range(count):
        yield _task(random.Random(f"{seed}/{split}/{index}"), f"{split}-{seed}-{index:05d}", split)


def _task(rng: random.Random, task_id: str, split: str) -> Task:
    modules = rng.sample(MODULES, 3)
    functions = {module: _names(rng, module, FUNCTIONS, split, rng.randint(2, 3)) for module in modules}
    constants = {module: _names(rng, module, CONSTANTS, split, rng.randint(0, 1)) for module in modules}
    # Names are unique within a task, so that a grep for one finds one place.
    functions, constants = _unique(functions), _unique(constants)
    calls = {(m, f): rng.choice(list(HELPERS)) for m, names in functions.items() for f in names}
    values = {(m, c): rng.randint(10, 99) for m, names in constants.items() for c in names}
    visible, hidden = _checks(rng, calls, values), _checks(rng, calls, values)

    if values and rng.random() < 0.2:
        place = rng.choice(list(values))
        values[place] = rng.choice([value for value in range(10, 100) if value != values[place]])
    else:
        place = rng.choice(list(calls))
        calls[place] = rng.choice([helper for helper in HELPERS if helper != calls[place]])

    files = {f"{module}.py": _module(rng, module, calls, values) for module in modules}
    files["lib.py"] = "".join(f"def {name}(a, b): return ({formula}) % {MODULUS}\n" for name, (formula, _) in HELPERS.items())
    files["test.py"] = _runner(visible)
    # Copies, so that a failed repair can start over.
    files |= {f"{ORIGINALS}/{name}": text for name, text in files.items()}
    return Task(
        id=task_id,
        statement=STATEMENT,
        files=files,
        # The check runs on arguments other than those that the agent sees, in a file that it never sees.
        grading=ScriptGrading(files={"hidden_test.py": _runner(hidden)}, command="python3 hidden_test.py"),
        split=split,
    )


def _names(rng: random.Random, module: str, pool: list[str], split: str, count: int) -> list[str]:
    return rng.sample([name for name in pool if is_held_out(module, name) == (split == "heldout")], count)


def _unique(names: dict[str, list[str]]) -> dict[str, list[str]]:
    seen: set[str] = set()
    unique: dict[str, list[str]] = {}
    for module, own in names.items():
        unique[module] = [name for name in own if name not in seen]
        seen.update(own)
    return unique


def _checks(rng: random.Random, calls: dict[tuple[str, str], str], values: dict[tuple[str, str], int]) -> list[Check]:
    checks: list[Check] = [(module, name, (), value) for (module, name), value in values.items()]
    for (module, name), helper in calls.items():
        for _ in range(2):
            arguments = _telling_arguments(rng)
            checks.append((module, name, arguments, HELPERS[helper][1](*arguments)))
    rng.shuffle(checks)
    return checks


def _telling_arguments(rng: random.Random) -> tuple[int, int]:
    """Return arguments on which no two helpers agree."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if len({function(a, b) for _, function in HELPERS.values()}) == len(HELPERS):
            return a, b


def _module(rng: random.Random, module: str, calls: dict[tuple[str, str], str], values: dict[tuple[str, str], int]) -> str:
    constants = [f"{name} = {value}\n" for (owner, name), value in values.items() if owner == module]
    functions = [f"def {name}(a, b): return {helper}(a, b)\n" for (owner, name), helper in calls.items() if owner == module]
    rng.shuffle(functions)
    return "".join([f"from lib import {', '.join(HELPERS)}\n", *constants, *functions])


def _runner(checks: list[Check]) -> str:
    return _RUNNER.format(checks="\n".join(f"    {check!r}," for check in checks))


def write(path: Path, tasks: Iterator[Task]) -> None:
    """Write one task per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(task.model_dump_json(exclude_none=True) + "\n" for task in tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write(options.out, _both(options.seed, options.train, options.held_out))


def _both(seed: int, train: int, held_out: int) -> Iterator[Task]:
    yield from generate(seed, train, held_out=False)
    yield from generate(seed, held_out, held_out=True)


if __name__ == "__main__":
    main()
