"""mini-swe-agent as a library leaves no trace on the machine or the terminal."""

import os
import subprocess
import sys
from pathlib import Path

from dagger_operator.api import Protocol
from dagger_operator.rollout.library import library


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
