"""mini-swe-agent as a library leaves no trace on the machine or the terminal."""

import os
import subprocess
import sys
from pathlib import Path

from dagger_operator.api import Protocol
from dagger_operator.rollout.library import library
from dagger_operator.tasks import swe


def test_importing_it_prints_nothing_and_writes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    program = "from dagger_operator.rollout.library import library; assert library().agent.__name__ == 'DefaultAgent'"
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == [home]


def test_a_dotenv_file_of_the_user_does_not_reach_the_worker(tmp_path: Path) -> None:
    (tmp_path / ".config" / "mini-swe-agent").mkdir(parents=True)
    (tmp_path / ".config" / "mini-swe-agent" / ".env").write_text("LEAKED=1\n")
    program = "import os; from dagger_operator.rollout.library import library; library(); print(os.environ.get('LEAKED'))"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "None\n", done.stderr


def test_prompts_are_those_of_the_public_board() -> None:
    text, tools = (library().config(protocol) for protocol in (Protocol.TEXT, Protocol.TOOL_CALL))
    assert "```mswea_bash_command" in text["agent"]["system_template"]
    assert "bash tool call" in tools["agent"]["instance_template"]


def test_commands_get_the_librarys_variables_whatever_the_protocol_and_images_theirs_by_task() -> None:
    text, tools = (library().environment(protocol) for protocol in (Protocol.TEXT, Protocol.TOOL_CALL))
    assert text == tools and text["PAGER"] == "cat"
    row = {
        **dict.fromkeys(("instance_id", "repo", "version", "eval_script", "problem_statement"), "x"),
        **dict.fromkeys(("FAIL_TO_PASS", "PASS_TO_PASS"), "[]"),
        "log_parser": "parse_log_pytest",
        "eval_type": "pass_and_fail",
    }
    for task in (swe.swebench_task(row), swe.swegym_task(row)):
        theirs = dict(library().config(Protocol.TOOL_CALL)["environment"]["env"])
        file = theirs.pop("BASH_ENV")
        assert task.env["BASH_ENV"] == f"$(if [ -r {file} ]; then echo {file}; fi)"  # so that no command says that it may not read it
        assert {**text, **task.env} == theirs | {"BASH_ENV": task.env["BASH_ENV"]}
