"""Grading of SWE-Gym's published rows: they name tests and a test patch, but not the script that runs them.

The commands match the images that SWE-Gym publishes for its 11 repositories (SWE-Gym/SWE-Bench-Package, `harness/constants.py` and
`harness/test_spec.py`). Its harness reinstalls the repository before it tests, from the network. The images have it installed in
place already and a sandbox has no network, so that step is left out.
"""

import re
import shlex
from typing import Any

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
"""swebench's markers (`harness.constants`), between which its parsers read."""
_NO_TESTS = (".json", ".png", "csv", ".txt", ".md", ".jpg", ".jpeg", ".pkl", ".yml", ".yaml", ".toml")
_PYTEST = "pytest -rA"
_IN_ONE_PROCESS = "pytest -n0 -rA"
_COMMANDS = {
    "bokeh/bokeh": _IN_ONE_PROCESS,
    "conan-io/conan": f"PYTHONPATH=${{PYTHONPATH:-}}:$(pwd) {_IN_ONE_PROCESS}",
    "dask/dask": f"{_IN_ONE_PROCESS} --color=no",
    "facebookresearch/hydra": f"{_PYTEST} --tb=long",
    "getmoto/moto": _IN_ONE_PROCESS,
    "iterative/dvc": _PYTEST,
    "modin-project/modin": _IN_ONE_PROCESS,
    "pandas-dev/pandas": f"{_PYTEST} --tb=long",
    "project-monai/monai": _PYTEST,
    "pydantic/pydantic": f"{_PYTEST} --tb=short -vv -o console_output_style=classic --no-header",
    # From 1.7 on SWE-Gym leaves mypy's own `-nauto` in place, one process per processor of the node, of which a sandbox has few.
    "python/mypy": _IN_ONE_PROCESS,
}
REPOSITORIES = tuple(_COMMANDS)


def grading_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return `eval_script`, `log_parser` and `eval_type` of a published row; empty if its repository or its test patch is unknown."""
    repository, test_patch, commit = (str(row.get(field) or "") for field in ("repo", "test_patch", "base_commit"))
    command = _COMMANDS.get(repository.lower())
    if command is None or not test_patch or not commit:
        return {}
    parser = "parse_log_pytest_v2" if repository.lower() == "pydantic/pydantic" else "parse_log_pytest"
    script = _script(f"{command} {_selection(repository, test_patch)}", test_patch, commit)
    return {"eval_script": script, "log_parser": parser, "eval_type": "pass_and_fail"}


def _script(command: str, test_patch: str, commit: str) -> str:
    changed = " ".join(map(shlex.quote, re.findall(r"^--- a/(.*)$", test_patch, re.M)))
    reset = f"git checkout {shlex.quote(commit)} {changed}" if changed else "true"
    lines = [
        "#!/bin/bash",
        "set -uxo pipefail",
        "set +u",  # conda's own scripts read unset variables
        "[ ! -e /opt/miniconda3/bin/activate ] || { source /opt/miniconda3/bin/activate && conda activate testbed; }",
        "git config --global --add safe.directory $(pwd)",
        reset,
        f"git apply -v - <<'EOF_114329324912'\n{test_patch}\nEOF_114329324912",
        f": '{START}'",
        command,
        f": '{END}'",
        reset,
    ]
    return "\n".join(lines) + "\n"


def _selection(repository: str, test_patch: str) -> str:
    """Return what to run: mypy's test cases by name, otherwise the files that the test patch touches."""
    if repository.lower() == "python/mypy":
        cases = dict.fromkeys(re.findall(r"\[case ([^\]]+)\]", test_patch))
        return f"-k {shlex.quote(' or '.join(cases))}"
    files = re.findall(r"^diff --git a/.* b/(.*)$", test_patch, re.M)
    return " ".join(shlex.quote(file) for file in files if not file.endswith(_NO_TESTS))
